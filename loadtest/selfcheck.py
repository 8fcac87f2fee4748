"""Whether the generator kept up. A measurement by a generator that was itself the bottleneck measures the
generator.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from loadtest.frames import Health
from loadtest.record import Record
from loadtest.results import Json
from loadtest.statistics import Samples, describe

# Beyond these the p99 of a latency of tens of milliseconds would be the generator's own.
LAG_P99_LIMIT_S = 0.005
CPU_RATIO_LIMIT = 0.9
SHORTEST_SPAN_S = 0.4


class SelfCheck:
    """Gathers what the generator processes say about themselves."""

    def __init__(self) -> None:
        self._lags_s: list[tuple[float, ...]] = []
        self._cpu: dict[int, list[tuple[float, float]]] = defaultdict(list)

    def add(self, health: Health) -> None:
        self._lags_s.append(tuple(health.lags_s))
        self._cpu[health.process].append((health.cpu_s, health.wall_s))

    def verdict(self, records: Sequence[Record], max_in_flight: int) -> Json:
        """`{"was_bottleneck", "reasons", "loop_lag_s", "cpu_ratio", "processes"}`.

        `loop_lag_s` is how late the event loop came to its timers, and so to arriving bytes: the error to
        expect in a latency. `cpu_ratio` is of the busiest process, in its busiest half second.
        """
        lag = describe(Samples.of(self._lags_s))
        del lag["histogram"], lag["intervals"]
        busiest = max(map(_busiest, self._cpu.values()), default=0.0)
        reasons = []
        if lag["p99"] is not None and lag["p99"] > LAG_P99_LIMIT_S:
            reasons.append(f"its event loop was late by {lag['p99'] * 1e3:.1f} ms at p99")
        if busiest > CPU_RATIO_LIMIT:
            reasons.append(f"a generator process used {busiest:.0%} of a core")
        if most_in_flight(records) >= max_in_flight:
            reasons.append(f"{max_in_flight} requests were in flight, the most that max_in_flight allows")
        return {
            "was_bottleneck": bool(reasons),
            "reasons": reasons,
            "loop_lag_s": lag,
            "cpu_ratio": round(busiest, 4),
            "processes": len(self._cpu),
        }


def _busiest(spans: list[tuple[float, float]]) -> float:
    """Share of a core in the busiest span that is long enough to tell."""
    return max((cpu_s / wall_s for cpu_s, wall_s in spans if wall_s >= SHORTEST_SPAN_S), default=0.0)


def most_in_flight(records: Sequence[Record]) -> int:
    """The most requests that were sent and not yet answered at one time."""
    starts = np.asarray([record.sent_s for record in records if record.sent_s is not None])
    ends = np.asarray([record.end_s for record in records if record.sent_s is not None])
    if not starts.size:
        return 0
    times = np.concatenate([ends, starts])
    steps = np.concatenate([-np.ones(ends.size), np.ones(starts.size)])
    return int(np.cumsum(steps[np.argsort(times, kind="stable")]).max())
