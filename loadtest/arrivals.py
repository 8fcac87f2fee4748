"""When each request leaves, in an open loop.

An **open loop** sends at times that were fixed before the server answered anything, as independent users do:
a stalled server meets the same arrivals as a fast one, and every request that waited shows it. A **closed
loop** (a fixed number of clients, each waiting for its answer) slows down together with the server and so
leaves out exactly the requests that would have suffered: Gil Tene's "coordinated omission". That is why
latency counts from these times.

Everything here is deterministic in the seed and knows neither clock nor server.
"""

import csv
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from loadtest.errors import InputError

Process = Literal["poisson", "constant", "bursty", "trace"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """Leaves `at_s` seconds after the start; a trace may also say how long prompt and answer are, in tokens."""

    index: int
    at_s: float
    prompt_tokens: int | None = None
    output_tokens: int | None = None


def constant(rate_per_s: float) -> Iterator[float]:
    """Evenly spaced: the gentlest load of a given rate."""
    return (index / rate_per_s for index in itertools.count())


def poisson(rate_per_s: float, rng: random.Random) -> Iterator[float]:
    """Exponential gaps: many independent users."""
    return gamma(rate_per_s, 1.0, rng)


def gamma(rate_per_s: float, burstiness: float, rng: random.Random) -> Iterator[float]:
    """Gamma gaps of shape `burstiness`: 1 is Poisson, 0.25 comes in clumps (coefficient of variation 2)."""
    mean_gap_s = 1.0 / rate_per_s
    at_s = 0.0
    while True:
        at_s += rng.gammavariate(burstiness, mean_gap_s / burstiness)
        yield at_s


def ramp(first_per_s: float, last_per_s: float, duration_s: float, times: Iterator[float]) -> Iterator[float]:
    """Bends unit-rate `times` so that the rate rises (or falls) linearly over `duration_s`.

    The n-th event of a process with rate r(t) comes when the integral of r reaches the unit-rate process's
    n-th time; for r(t) = a + ct that integral is a quadratic, solved here.
    """
    slope = (last_per_s - first_per_s) / duration_s
    for unit_s in times:
        if slope == 0:
            yield unit_s / first_per_s
            continue
        under_root = first_per_s**2 + 2 * slope * unit_s
        if under_root < 0:  # a falling rate reached zero: nothing arrives after that
            return
        yield (under_root**0.5 - first_per_s) / slope


def read_trace(path: Path, speed: float = 1.0) -> list[Arrival]:
    """Arrivals recorded elsewhere, sorted and shifted to start at zero; `speed` 2 replays twice as fast.

    JSON lines with `at_s`, or Mooncake's `timestamp` (milliseconds), `input_length`, `output_length`; or CSV
    in the form of Azure's LLM traces (`TIMESTAMP`, `ContextTokens`, `GeneratedTokens`).
    """
    entries: list[Arrival] = []
    try:
        with path.open() as lines:
            rows = csv.DictReader(lines) if path.suffix == ".csv" else map(json.loads, filter(str.strip, lines))
            entries.extend(_trace_entry(row) for row in rows)
    except OSError as error:
        raise InputError(f"trace {path}: {error.strerror}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"trace {path}, entry {len(entries) + 1}: {error!r}") from error
    if not entries:
        raise InputError(f"trace {path}: no entries")
    entries.sort(key=lambda entry: entry.at_s)
    first_s = entries[0].at_s
    return [
        Arrival(index, (entry.at_s - first_s) / speed, entry.prompt_tokens, entry.output_tokens)
        for index, entry in enumerate(entries)
    ]


def _trace_entry(row: dict[str, Any]) -> Arrival:
    if "TIMESTAMP" in row:
        at_s = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
    elif "at_s" in row:
        at_s = float(row["at_s"])
    else:
        at_s = float(row["timestamp"]) / 1000
    return Arrival(
        index=0,
        at_s=at_s,
        prompt_tokens=_first_int(row, "prompt_tokens", "input_length", "ContextTokens"),
        output_tokens=_first_int(row, "output_tokens", "output_length", "GeneratedTokens"),
    )


def _first_int(row: dict[str, Any], *names: str) -> int | None:
    return next((int(row[name]) for name in names if row.get(name) not in (None, "")), None)
