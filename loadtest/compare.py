"""Which differences between two results are real.

Each result carries intervals. The interval of a ratio B / A follows from both by MOVER (Zou & Donner 2008,
"Construction of confidence intervals about effect measures"), on logarithms, which needs no raw data and keeps
lopsided intervals lopsided. Many comparisons at 95 % find a difference by chance, so the intervals are widened for
their number (Bonferroni). They cover the variation within each run; how two runs of the same thing differ, only more
runs can show.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import NormalDist
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


def compare(a: Json, b: Json, a_variant: str | None = None, b_variant: str | None = None) -> Json:
    """Groups of the same name against each other; or one variant of A against one of B, which may be the same result.

    KeyError where a named variant is not in its result.
    """
    pairs = _pairs(a, b, a_variant, b_variant)
    cells = [(name, *cell) for name, group_a, group_b in pairs for cell in _cells(group_a, group_b)]
    widening = _widening(sum(before.interval is not None and after.interval is not None for *_, before, after in cells))
    rows = [_difference(*cell, widening) for cell in cells]
    return {
        "settings_that_differ": _settings_that_differ(a, b),
        "same_machine": a["machine"] == b["machine"],
        "confidence": CONFIDENCE,
        "comparisons": len(rows),
        "rows": [asdict(row) for row in rows],
        "worse": sum(row.verdict == "worse" for row in rows),
        "better": sum(row.verdict == "better" for row in rows),
    }


def _pairs(a: Json, b: Json, a_variant: str | None, b_variant: str | None) -> list[tuple[str, Json, Json]]:
    if a_variant is not None or b_variant is not None:
        names = (a_variant or b_variant or "", b_variant or a_variant or "")
        return [(f"{names[0]} → {names[1]}", a["by_variant"][names[0]], b["by_variant"][names[1]])]
    both = [name for name in a["by_variant"] if name in b["by_variant"]]
    variants = [(name, a["by_variant"][name], b["by_variant"][name]) for name in both]
    return [("overall", a["overall"], b["overall"]), *variants]


def _cells(a: Json, b: Json) -> Iterator[tuple[str, str, Estimate, Estimate]]:
    for metric in LATENCIES:
        if a[metric]["count"] and b[metric]["count"]:
            for name in LATENCY_STATISTICS:
                yield metric, name, _of_latency(a[metric], name), _of_latency(b[metric], name)
    for metric in RATES:
        if a[metric] is not None and b[metric] is not None:
            yield metric, "mean", _of_rate(a, metric), _of_rate(b, metric)


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
