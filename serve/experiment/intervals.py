"""Intervals that hold while one watches, for means, shares and percentiles of requests that depend on one another.

**Variance.** The unit of analysis is the user and the block of time, never the request. What is estimated is a ratio
of sums, R = Σy / Σx; a cluster's score is (y - R x) / Σx, and the variance is taken over scores of users, over scores
of blocks (a neighbour's included, as in Newey & West 1987), and combined as users + blocks - single requests (Cameron,
Gelbach & Miller 2011), never below any of them. `1 + 12 / clusters` allows for few clusters, as in `rollout.sums`.

**Means.** The interval at all times of `rollout.sequential`: a normal mixture (arXiv 2103.06476), here both sides.

**Shares** such as an error rate: every probability that the beta-binomial bet cannot yet rule out, with the counts
divided by the design effect (Rao & Scott 1992), the factor by which the variance above exceeds that of independent
requests.

**Percentiles.** For independent values, "at most p of them lie below the p-quantile" is a bet on a coin with known
probability p, so the values that it cannot rule out are a confidence sequence for the quantile: Howard & Ramdas, arXiv
1906.09714, of whose boundaries we take the beta-binomial mixture. Their guarantee is for independent values. We keep
the bet and weaken the counts by the design effect of "lies below the estimate" (Woodruff 1952 inverts the same share
for surveys), so that users and blocks are what counts. With an estimated design effect the guarantee holds as clusters
accumulate: below `_LEAST_N` requests or `_LEAST_CLUSTERS` users or blocks there is no interval.

**A common mix.** All of it also works for a weighted sum over strata, which gives each variant the number that it
would have had if all variants had met the same prompts at the same load (direct standardisation).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import log, sqrt
from typing import Final

from serve.experiment.clusters import Ratio, Values, bucket_edge_s
from serve.rollout.sequential import beta_binomial_log_e, critical_z

__all__ = ["ALPHA", "Interval", "Part", "mean_interval", "quantile_interval", "share_interval"]

ALPHA: Final = 0.05
"""The chance that an interval ever misses, over all the times that one looks."""

_LEAST_N: Final = 50
_LEAST_CLUSTERS: Final = 5
_FEW_CLUSTERS: Final = 12.0
_SCALE: Final = 0.1  # relative size of effect at which the intervals of means are tightest
_STEPS: Final = 30

Part = tuple[float, Ratio]
"""A stratum's weight (all sum to 1) and its sums."""


@dataclass(frozen=True)
class Interval:
    """`low` and `high` are None while there is too little to say; `high` alone, where it lies beyond what was seen."""

    estimate: float | None = None
    low: float | None = None
    high: float | None = None

    def map(self, shown: Callable[[float], float]) -> Interval:
        """On another scale, by a rising function."""
        return Interval(*(None if value is None else shown(value) for value in (self.estimate, self.low, self.high)))

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


def mean_interval(parts: Sequence[Part], alpha: float = ALPHA, scale: float | None = None) -> Interval:
    """Of Σ weight · R. `scale`: the size of effect that matters; by default a tenth of the estimate."""
    seen = _Seen(parts)
    if not seen.n:
        return Interval()
    if not seen.enough:
        return Interval(seen.estimate)
    width = scale or _SCALE * abs(seen.estimate)
    variance = max(seen.variance, (1e-3 * width) ** 2)
    half = critical_z(variance, width, alpha / 2.0) * sqrt(variance) if width else 0.0
    return Interval(seen.estimate, seen.estimate - half, seen.estimate + half)


def share_interval(ratio: Ratio, alpha: float = ALPHA) -> Interval:
    """Of a share of requests (y is 0 or 1, x is 1)."""
    seen = _Seen([(1.0, ratio)])
    if not seen.n:
        return Interval()
    share = min(max(seen.estimate, 0.0), 1.0)
    if not seen.enough:
        return Interval(share)
    n = seen.effective_n(share)

    def ruled_out(probability: float) -> bool:
        return beta_binomial_log_e(n * share, n * (1.0 - share), probability) >= -log(alpha)

    low = 0.0 if share == 0.0 else _bisect(0.0, share, ruled_out)
    high = 1.0 if share == 1.0 else _bisect(1.0, share, ruled_out)
    return Interval(share, low, high)


def quantile_interval(parts: Sequence[tuple[float, Values]], p: float, alpha: float = ALPHA) -> Interval:
    """Of the p-quantile of the mixture of the strata by their weights."""
    parts = [(weight, values) for weight, values in parts if values.n]
    if not parts:
        return Interval()
    quantiles = _Quantiles(parts)
    estimate = quantiles.at(p)
    seen = _Seen([(weight, values.below(estimate)) for weight, values in parts])
    if not seen.enough:
        return Interval(estimate)
    n = seen.effective_n(p)

    def ruled_out(share: float) -> bool:
        return beta_binomial_log_e(n * share, n * (1.0 - share), p) >= -log(alpha)

    low = quantiles.at(_bisect(0.0, p, ruled_out)) if ruled_out(0.0) else None
    high = quantiles.at(_bisect(1.0, p, ruled_out)) if ruled_out(1.0) else None
    return Interval(estimate, low, high)


class _Seen:
    """A weighted sum of ratios with its variance."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = [(weight / ratio.x, ratio) for weight, ratio in parts if ratio.x > 0.0]
        self.n = sum(ratio.n for _, ratio in self._parts)
        self.estimate = sum(factor * ratio.y for factor, ratio in self._parts)
        users, blocks = self._scores("users"), self._scores("blocks")
        self._clusters = min(len(users), len(blocks))
        by_user = sum(score * score for score in users.values())
        by_block = sum(score * (score + 2.0 * before) for score, before in _with_neighbours(blocks))
        alone = sum(factor**2 * _single_scores(ratio) for factor, ratio in self._parts)
        self._alone = alone
        self._clustered = max(by_user, by_block, alone, by_user + by_block - alone)

    @property
    def enough(self) -> bool:
        return self.n >= _LEAST_N and self._clusters >= _LEAST_CLUSTERS

    @property
    def variance(self) -> float:
        return self._clustered * (1.0 + _FEW_CLUSTERS / max(1, self._clusters))

    def effective_n(self, share: float) -> float:
        """How many independent requests would know a share as well as these do; never more than there are."""
        binomial = share * (1.0 - share)
        if self.variance <= 0.0 or binomial <= 0.0:
            return self.n / (1.0 + _FEW_CLUSTERS / max(1, self._clusters))
        return min(float(self.n), binomial / self.variance)

    def _scores(self, way: str) -> dict[int, float]:
        scores: dict[int, float] = {}
        for factor, ratio in self._parts:
            value = ratio.value
            clusters: dict[int, list[float]] = getattr(ratio, way)
            for key, (y, x) in clusters.items():
                scores[key] = scores.get(key, 0.0) + factor * (y - value * x)
        return scores


class _Quantiles:
    """The distribution of a weighted mixture, read along a line between the edges of buckets."""

    def __init__(self, parts: Sequence[tuple[float, Values]]) -> None:
        shares: dict[int, float] = {}
        for weight, values in parts:
            for bucket, count in values.counts.items():
                shares[bucket] = shares.get(bucket, 0.0) + weight * count / values.n
        self._buckets = sorted(shares)
        self._shares = [shares[bucket] for bucket in self._buckets]
        self._below = [0.0, *accumulate(self._shares)]

    def at(self, p: float) -> float:
        whole = self._below[-1]
        index = min(max(bisect_right(self._below, p * whole) - 1, 0), len(self._buckets) - 1)
        low, high = bucket_edge_s(self._buckets[index]), bucket_edge_s(self._buckets[index] + 1)
        within = (p * whole - self._below[index]) / self._shares[index]
        return low * float((high / low) ** min(max(within, 0.0), 1.0))


def _with_neighbours(scores: dict[int, float]) -> list[tuple[float, float]]:
    """Each block's score beside that of the block before it."""
    return [(score, scores.get(block - 1, 0.0)) for block, score in scores.items()]


def _single_scores(ratio: Ratio) -> float:
    yy, xy, xx = ratio.squares
    return max(0.0, yy - 2.0 * ratio.value * xy + ratio.value**2 * xx)


def _bisect(outside: float, inside: float, ruled_out: Callable[[float], bool]) -> float:
    """The edge between a point that may be ruled out and one that is not."""
    if not ruled_out(outside):
        return outside
    for _ in range(_STEPS):
        middle = 0.5 * (outside + inside)
        outside, inside = (middle, inside) if ruled_out(middle) else (outside, middle)
    return outside
