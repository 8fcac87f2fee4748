"""Takes turns: every contestant measures once in each round, so that a machine that drifts drifts for all of them.

What has been measured is written after every turn; a later run with `resume` adds to it.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from loadtest.engine.bench_model import Shape
from loadtest.engine.contestants import CONTESTANTS, OURS, Contestant, Place, Running, start
from loadtest.engine.session import Order
from loadtest.errors import InputError, WorkerError
from loadtest.results import Json

Job = tuple[str, int]
Key = tuple[str, str, str, int]
"""Engine, precision, phase, batch size."""
_OPS = {(one.engine, one.precision): one.ops for one in CONTESTANTS}


@dataclass
class Found:
    """Everything measured so far."""

    shape: Shape
    order: Order
    runs: dict[Key, list[float]] = field(default_factory=dict)
    facts: dict[tuple[str, str], list[Json]] = field(default_factory=dict)
    limits: list[Json] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, contestant: Contestant, runs: Iterable[tuple[str, int, float]], facts: Json) -> None:
        for phase, batch_size, rate in runs:
            self.runs.setdefault((contestant.engine, contestant.precision, phase, batch_size), []).append(rate)
        self.facts.setdefault((contestant.engine, contestant.precision), []).append(dict(facts))

    def take(self, result: Json) -> None:
        """Continues from an earlier result."""
        for row in result["rows"]:
            key = (row["engine"], row["precision"], row["phase"], row["batch_size"])
            self.runs[key] = list(row["runs_tokens_per_s"])
        for engine in result["engines"]:
            self.facts[engine["engine"], engine["precision"]] = list(engine["turns"])
        self.limits = list(result["limits"])


def jobs_of(order: Order) -> list[Job]:
    return [("prefill", 1), *(("decode", size) for size in order.batch_sizes)]


def measure(
    found: Found,
    contestants: Sequence[Contestant],
    place: Place,
    rounds: int,
    repeats: int,
    tell: Callable[[str], None],
    keep: Callable[[], None],
) -> None:
    """Fills `found`, and calls `keep` after every turn; who cannot run is noted in `failures`, the others go on."""
    with ExitStack() as stack:
        running: dict[Contestant, Running] = {}
        for contestant in contestants:
            tell(f"loading {contestant.name}")
            with _noting(found, contestant):
                running[contestant] = start(contestant, found.order, place)
                stack.callback(running[contestant].close)
        before = max((len(runs) for runs in found.runs.values()), default=0)
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}: limits")
            found.limits.append(_limits(found.order.threads))
            for contestant in [one for one in contestants if one in running]:
                tell(f"round {number + 1} of {rounds}: {contestant.name}")
                with _noting(found, contestant) as failed:
                    runs = running[contestant].measure(jobs_of(found.order), repeats, f"{before}:{number}")
                    found.add(contestant, runs, running[contestant].facts)
                if failed:
                    del running[contestant]
                keep()


class _noting:  # noqa: N801 - reads as a verb
    """Keeps a contestant's failure from ending the others' measurement; true once it failed."""

    def __init__(self, found: Found, contestant: Contestant) -> None:
        self._found, self._name, self._failed = found, contestant.name, False

    def __enter__(self) -> "_noting":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, WorkerError | InputError | OSError):
            self._found.failures[self._name] = str(error)
            self._failed = True
        return self._failed

    def __bool__(self) -> bool:
        return self._failed


def _limits(threads: int) -> Json:
    command = [sys.executable, "-W", "ignore", "-m", "loadtest.engine.limits", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise WorkerError(f"the machine's limits could not be measured: {done.stderr.strip()[-500:]}")
    return dict(json.loads(done.stdout))


def result(found: Found) -> Json:
    """DESIGN's shape, and what it was computed from."""
    limits = {name: statistics.median(one[name] for one in found.limits) for name in found.limits[0]}
    return {
        **limits,
        "threads": found.order.threads,
        "prompt_tokens": found.order.prompt_tokens,
        "decode_tokens": found.order.decode_tokens,
        "rows": list(_rows(found, limits)),
        "engines": list(_engines(found)),
        "limits": found.limits,
        "failures": found.failures,
    }


def _rows(found: Found, limits: Json) -> Iterator[Json]:
    for (engine, precision, phase, batch_size), runs in found.runs.items():
        turns = found.facts[engine, precision]
        limit = _limit(found, limits, turns[-1]["bytes_per_step"], _OPS[engine, precision], phase, batch_size)
        middle = statistics.median(runs)
        yield {
            "engine": engine,
            "precision": precision,
            "phase": phase,
            "batch_size": batch_size,
            "tokens_per_s": middle,
            "limit_tokens_per_s": limit,
            "limit_ratio": middle / limit,
            "resident_bytes": turns[-1]["resident_bytes"],
            "peak_bytes": turns[-1]["peak_bytes"],
            "load_s": statistics.median(turn["load_s"] for turn in turns),
            "runs_tokens_per_s": runs,
        }


def _limit(found: Found, limits: Json, step_bytes: int, arithmetic: str, phase: str, batch_size: int) -> float:
    """Tokens per second if nothing but reading memory, or nothing but multiplying, took time: the lower of the two."""
    shape, order = found.shape, found.order
    ops_per_s: float = limits[f"{arithmetic}_ops_per_s"]
    bandwidth: float = limits["bandwidth_bytes_per_s"]
    if phase == "prefill":
        ops = 2 * (order.prompt_tokens * shape.layer_parameters + shape.head_parameters)
        seconds = max(ops / ops_per_s, step_bytes / bandwidth)
        return order.prompt_tokens / seconds
    read = step_bytes + batch_size * shape.kv_bytes(order.prompt_tokens + order.decode_tokens / 2)
    ops = 2 * batch_size * (shape.layer_parameters + shape.head_parameters)
    return batch_size / max(read / bandwidth, ops / ops_per_s)


def _engines(found: Found) -> Iterator[Json]:
    for (engine, precision), turns in found.facts.items():
        last = turns[-1]
        facts: Json = {"engine": engine, "precision": precision, "version": last["version"]}
        if engine == OURS:
            facts["overhead_bytes"] = last["resident_bytes"] - last["model_bytes"] - last["kv_cache_bytes"]
        yield facts | {"bytes_per_step": last["bytes_per_step"], "turns": turns}
