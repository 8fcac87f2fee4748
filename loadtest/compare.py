"""Which differences between two results are real.

Each result carries intervals. The interval of a ratio B / A follows from both by MOVER (Zou & Donner 2008,
"Construction of confidence intervals about effect measures"), on logarithms, which needs no raw data and keeps
lopsided intervals lopsided. Many comparisons at 95 % find a difference by chance, so the intervals are widened for
their number (Bonferroni). They cover the variation within each run; how two runs of the same thing differ, only more
runs can show: with several on a side, its interval reaches over all of theirs, which is wide, and hard to fool.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, median
from typing import Literal

from loadtest.results import Json
from loadtest.statistics import CONFIDENCE, Interval

LATENCIES = ("ttft_s", "itl_s", "tpot_s", "e2e_s")
LATENCY_STATISTICS = ("mean", "p50", "p90", "p99")
RATES = ("requests_per_s", "tokens_per_s", "goodput_ratio")
IGNORED_SETTINGS = frozenset(("url", "headers", "api_key_env"))

Verdict = Literal["better", "worse", "no difference seen", "too few samples"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its interval, None where there were too few samples for one."""

    value: float
    interval: Interval | None

    @classmethod
    def over(cls, runs: Sequence["Estimate"]) -> "Estimate":
        """The median of several runs, with an interval that holds all of theirs."""
        intervals = [run.interval for run in runs if run.interval is not None]
        value = median(run.value for run in runs)
        if len(intervals) < len(runs):
            return cls(value, None)
        return cls(value, (min(low for low, _ in intervals), max(high for _, high in intervals)))


@dataclass(frozen=True, slots=True)
class Difference:
    """B against A. `change_ratio` is B / A - 1, with its interval; `verdict` is about B."""

    group: str
    metric: str
    statistic: str
    a: float
    b: float
    change_ratio: float
    interval: Interval | None
    verdict: Verdict


def compare(a: Sequence[Json], b: Sequence[Json], a_variant: str | None = None, b_variant: str | None = None) -> Json:
    """One or more runs of A against as many or fewer of B, groups of the same name against each other; or one variant
    of A against one of B, which may be the same runs. KeyError where a named variant is not in a result.
    """
    cells = [
        (name, *cell) for name, before, after in _pairs(a, b, a_variant, b_variant) for cell in _cells(before, after)
    ]
    known = sum(before.interval is not None and after.interval is not None for *_, before, after in cells)
    rows = [_difference(*cell, _widening(known)) for cell in cells]
    return {
        "settings_that_differ": _settings_that_differ(a[0], b[0]),
        "same_machine": all(run["machine"] == a[0]["machine"] for run in (*a, *b)),
        "runs": [len(a), len(b)],
        "confidence": CONFIDENCE,
        "comparisons": len(rows),
        "rows": [asdict(row) for row in rows],
        "worse": sum(row.verdict == "worse" for row in rows),
        "better": sum(row.verdict == "better" for row in rows),
    }


Groups = list[Json]


def _pairs(
    a: Sequence[Json], b: Sequence[Json], a_variant: str | None, b_variant: str | None
) -> list[tuple[str, Groups, Groups]]:
    if a_variant is not None or b_variant is not None:
        first, second = a_variant or b_variant or "", b_variant or a_variant or ""
        return [(f"{first} → {second}", _variant(a, first), _variant(b, second))]
    both = [name for name in a[0]["by_variant"] if all(name in run["by_variant"] for run in (*a, *b))]
    overall = ("overall", [run["overall"] for run in a], [run["overall"] for run in b])
    return [overall, *((name, _variant(a, name), _variant(b, name)) for name in both)]


def _variant(runs: Sequence[Json], name: str) -> Groups:
    return [run["by_variant"][name] for run in runs]


def _cells(a: Groups, b: Groups) -> Iterator[tuple[str, str, Estimate, Estimate]]:
    for metric in LATENCIES:
        if all(group[metric]["count"] for group in (*a, *b)):
            for name in LATENCY_STATISTICS:
                before, after = (Estimate.over([_of_latency(g[metric], name) for g in side]) for side in (a, b))
                yield metric, name, before, after
    for metric in RATES:
        if all(group[metric] is not None for group in (*a, *b)):
            before, after = (Estimate.over([_of_rate(g, metric) for g in side]) for side in (a, b))
            yield metric, "mean", before, after


def _of_latency(values: Json, statistic: str) -> Estimate:
    return Estimate(values[statistic], _interval(values["intervals"].get(statistic)))


def _of_rate(group: Json, metric: str) -> Estimate:
    return Estimate(group[metric], _interval(group[f"{metric}_interval"]))


def _interval(bounds: list[float] | None) -> Interval | None:
    return None if bounds is None else (bounds[0], bounds[1])


def _difference(group: str, metric: str, statistic: str, a: Estimate, b: Estimate, widening: float) -> Difference:
    change = b.value / a.value - 1 if a.value else math.inf
    interval = ratio_interval(a, b, widening)
    return Difference(group, metric, statistic, a.value, b.value, change, interval, _verdict(metric, interval))


def ratio_interval(a: Estimate, b: Estimate, widening: float = 1.0) -> Interval | None:
    """Interval of B / A - 1, `widening` times as wide (on logarithms) as at 95 %; None where either has none."""
    if a.interval is None or b.interval is None or min(a.interval[0], b.interval[0], a.value, b.value) <= 0:
        return None
    middle = math.log(b.value / a.value)
    below = math.hypot(math.log(b.value / b.interval[0]), math.log(a.interval[1] / a.value))
    above = math.hypot(math.log(b.interval[1] / b.value), math.log(a.value / a.interval[0]))
    return math.expm1(middle - widening * below), math.expm1(middle + widening * above)


def _verdict(metric: str, interval: Interval | None) -> Verdict:
    if interval is None:
        return "too few samples"
    if interval[0] <= 0 <= interval[1]:
        return "no difference seen"
    is_more = interval[0] > 0
    return "better" if is_more == (metric in RATES) else "worse"


def _widening(comparisons: int) -> float:
    """How much wider an interval must be when it is one of so many."""
    single = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * max(1, comparisons))) / single


def _settings_that_differ(a: Json, b: Json) -> dict[str, list[object]]:
    """A fair comparison differs in one thing; these are the things."""
    first, second = a["settings"], b["settings"]
    names = (name for name in first if name not in IGNORED_SETTINGS and first[name] != second.get(name))
    return {name: [first[name], second.get(name)] for name in names}
