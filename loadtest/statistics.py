"""Percentiles to p99.9, and how sure one can be of them.

Percentiles come from an HdrHistogram (microseconds, three significant digits: an error of at most 0.1 %);
mean and maximum are exact. Intervals are bootstrap intervals at 95 %. Requests that queue behind one another
are alike, and so are the gaps within one answer, so blocks of neighbouring requests are drawn again, not
single values: drawing single values would promise a certainty that is not there. Block length is the cube
root of the number of requests (Hall, Horowitz & Jing 1995). What a bootstrap cannot see is how another run on
another day would differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}
CONFIDENCE = 0.95
FEWEST_BLOCKS = 8
FEWEST_BEYOND = 5
_HIGHEST_US = 24 * 3600 * 1_000_000
_WORK = 20_000_000

Interval = tuple[float, float]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Samples:
    """Values in seconds, and for each the number of the request it came from (in order of being due)."""

    values_s: Floats
    requests: NDArray[np.int64]

    @classmethod
    def of(cls, per_request: Sequence[Sequence[float]]) -> "Samples":
        """From one sequence of values for each request, in order; it may be empty."""
        counts = [len(values) for values in per_request]
        flat = [value for values in per_request for value in values]
        return cls(np.asarray(flat, dtype=np.float64), np.repeat(np.arange(len(counts)), counts))

    @property
    def blocks(self) -> NDArray[np.int64]:
        """For each value the block of neighbouring requests it belongs to."""
        if not self.requests.size:
            return self.requests
        positions: NDArray[np.int64] = np.unique(self.requests, return_inverse=True)[1]
        length = max(1, round((int(positions[-1]) + 1) ** (1 / 3)))
        numbers: NDArray[np.int64] = positions // length
        return numbers


def histogram(values_s: Floats) -> HdrHistogram:
    """The values as whole microseconds; what is below zero or above a day is put at that end."""
    counts = HdrHistogram(1, _HIGHEST_US, 3)
    microseconds = np.clip(np.rint(values_s * 1e6), 0, _HIGHEST_US).astype(np.int64)
    for value, count in zip(*np.unique(microseconds, return_counts=True), strict=True):
        counts.record_value(int(value), int(count))
    return counts


def percentiles(counts: HdrHistogram) -> dict[str, float]:
    """By nearest rank, in seconds: the smallest value that at least that share of all does not exceed."""
    total = counts.get_total_count()
    # HdrHistogram rounds the rank to the nearest; asked for a whole rank it has nothing to round
    asked = {name: 100 * math.ceil(total * share / 100 - 1e-9) / total for name, share in PERCENTILES.items()}
    at = counts.get_percentile_to_value_dict(list(asked.values()))
    return {name: at[percentile] / 1e6 for name, percentile in asked.items()}


def describe(samples: Samples, seed: int = 0) -> dict[str, Any]:
    """`{"count", "mean", "p50", ..., "max", "intervals", "histogram"}`, every value None where there is no
    sample.

    `histogram` is the HdrHistogram in its own portable encoding; any HdrHistogram tool reads and merges it.
    """
    if not samples.values_s.size:
        empty = dict.fromkeys(("mean", *PERCENTILES, "max"))
        return {"count": 0, **empty, "intervals": {}, "histogram": None}
    counts = histogram(samples.values_s)
    greatest = float(samples.values_s.max())
    return {
        "count": int(samples.values_s.size),
        "mean": float(samples.values_s.mean()),
        **{name: min(value_s, greatest) for name, value_s in percentiles(counts).items()},
        "max": greatest,
        "intervals": intervals(samples, seed),
        "histogram": counts.encode().decode(),
    }


def intervals(samples: Samples, seed: int = 0) -> dict[str, Interval | None]:
    """Bootstrap intervals of the mean and each percentile; None where the samples are too few to say.

    A percentile needs a handful of samples beyond it: p99.9 of 500 requests is their maximum and nothing
    more.
    """
    names = ("mean", *PERCENTILES)
    blocks = samples.blocks
    block_count = int(blocks[-1]) + 1
    if block_count < FEWEST_BLOCKS:
        return dict.fromkeys(names)
    estimates = _resample(samples.values_s, blocks, block_count, np.random.default_rng(seed))
    low, high = np.quantile(estimates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    found: dict[str, Interval | None] = {}
    for position, name in enumerate(names):
        beyond = samples.values_s.size * (1 - PERCENTILES.get(name, 0.0) / 100)
        known = beyond >= FEWEST_BEYOND
        found[name] = (float(low[position]), float(high[position])) if known else None
    return found


def _resample(values: Floats, blocks: NDArray[np.int64], count: int, rng: np.random.Generator) -> Floats:
    """Mean and percentiles of resamples `[resamples, 1 + percentiles]`; drawing a block draws all its values."""
    order = np.argsort(values, kind="stable")
    values, blocks = values[order], blocks[order]
    resamples = int(np.clip(_WORK // values.size, 100, 500))
    shares = np.asarray(list(PERCENTILES.values())) / 100
    estimates = np.empty((resamples, 1 + shares.size))
    for row in estimates:
        weights = np.bincount(rng.integers(count, size=count), minlength=count)[blocks]
        reached = np.cumsum(weights)
        row[0] = weights @ values / reached[-1]
        # the value at which the wanted share of the resample is reached
        row[1:] = values[np.searchsorted(reached, np.maximum(1, shares * reached[-1]))]
    return estimates


def mean_interval(values: Floats, seed: int = 0) -> Interval | None:
    """Bootstrap interval of the mean of a series, by blocks of neighbours."""
    samples = Samples(values, np.arange(values.size))
    return intervals(samples, seed)["mean"] if values.size else None


def wilson(successes: int, trials: int) -> Interval | None:
    """Wilson's score interval of a share (1927): sensible at 0 and at 1, where a bootstrap promises certainty."""
    if trials == 0:
        return None
    z = 1.959964
    share = successes / trials
    scale = 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return (max(0.0, middle - half), min(1.0, middle + half))


def corrected_for_omission(values_s: Floats, expected_gap_s: float) -> HdrHistogram:
    """HdrHistogram's correction of a closed loop: a wait longer than the usual gap hid the requests it held
    up.

    A value v stands also for the requests that would have waited v - gap, v - 2 gap, ... An estimate, not a
    measurement.
    """
    counts = HdrHistogram(1, _HIGHEST_US, 3)
    gap_us = max(1, round(expected_gap_s * 1e6))
    for value_s in values_s:
        counts.record_corrected_value(max(1, round(float(value_s) * 1e6)), gap_us)
    return counts
