"""Several stages as one finding: where the knee is, and the highest rate that still meets the SLO.

**Knee**: the stage with the greatest *power*, throughput over latency (Kleinrock, "Power and deterministic
rules of thumb", 1979). Below it more load costs little latency, above it more latency buys little throughput.
**Goodput** (DistServe, arXiv 2401.09670): requests a second that meet every limit of the SLO.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from loadtest.record import Record
from loadtest.results import Json
from loadtest.settings import Load
from loadtest.summary import Window

SEARCH_FROM_PER_S = 1.0
SEARCH_TO_RATIO = 1.1
MOST_SEARCH_STAGES = 20
RAMP_PARTS = 10


def knee(stages: Sequence[Json]) -> int | None:
    """Position of the stage with the greatest power; None where fewer than three stages have one."""
    powers = [_power(stage["overall"]) for stage in stages]
    if sum(power is not None for power in powers) < 3:
        return None
    return max(range(len(powers)), key=lambda position: powers[position] or 0.0)


def _power(group: Json) -> float | None:
    e2e_s = group["e2e_s"]["p50"]
    return group["requests_per_s"] / e2e_s if e2e_s else None


def meets(group: Json, target_ratio: float) -> bool:
    """Whether enough requests were good."""
    ratio = group["goodput_ratio"]
    return ratio is not None and ratio >= target_ratio


def highest_meeting(stages: Sequence[Json], target_ratio: float) -> int | None:
    """Position of the stage with the highest load that meets the target, counting only those below the first
    failure.

    A higher stage that passes after a lower one failed passed by luck.
    """
    best: int | None = None
    for position in sorted(range(len(stages)), key=lambda number: _load(stages[number])):
        if not meets(stages[position]["overall"], target_ratio):
            break
        best = position
    return best


def _load(stage: Json) -> float:
    offered = stage["offered"]
    return float(offered.get("rate_per_s") or offered.get("concurrency") or 0.0)


def next_rate(tried: Sequence[tuple[float, bool]]) -> float | None:
    """The rate to try next, given (rate, met); None when the answer is known to within 10 %, or stays out of
    reach.

    Doubles while the SLO is met, halves while it never was, then bisects geometrically.
    """
    if not tried:
        return SEARCH_FROM_PER_S
    if len(tried) >= MOST_SEARCH_STAGES:
        return None
    failed = [rate for rate, met in tried if not met]
    lowest_failed = min(failed, default=math.inf)
    met = [rate for rate, met in tried if met and rate < lowest_failed]
    if not failed:
        return max(met) * 2
    if not met:
        return lowest_failed / 2 if lowest_failed > SEARCH_FROM_PER_S / 64 else None
    if lowest_failed / max(met) <= SEARCH_TO_RATIO:
        return None
    return math.sqrt(lowest_failed * max(met))


def ramp_parts(load: Load, records: Sequence[Record]) -> Iterator[tuple[Load, Window, list[Record]]]:
    """A ramp in equal parts, as if they were stages at their middle rates; each counts the requests due in it.

    What one part could not answer burdens the next, so the knee of a ramp comes a little late; a sweep starts each
    stage with an empty server.
    """
    assert load.rate_per_s is not None
    assert load.last_rate_per_s is not None
    assert load.total_s is not None
    last_due_s = max((record.scheduled_s for record in records), default=0.0)
    for number in range(RAMP_PARTS):
        window = Window(load.total_s * number / RAMP_PARTS, load.total_s * (number + 1) / RAMP_PARTS)
        if window.start_s > last_due_s:
            return
        middle_per_s = load.rate_per_s + (load.last_rate_per_s - load.rate_per_s) * (number + 0.5) / RAMP_PARTS
        marked = [replace(record, warmup=not window.holds(record.scheduled_s)) for record in records]
        yield Load(rate_per_s=middle_per_s, duration_s=window.length_s), window, marked
