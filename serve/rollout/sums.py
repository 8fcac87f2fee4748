"""A mean, or a difference between two arms, with a variance that is honest about dependence.

Requests are not independent: a user's requests resemble each other, and so do those that stood in one queue. What is
summed here are *scores*. For a difference between arms the score of a request is

    (arm - share) * (value - mean)          arm: 1 on the canary, 0 on stable

where `share` is the canary's recent share of the stratum and `mean` its recent mean, both known *before* the request.
The score's mean is 0 when the arms do not differ, and the sum over `(arm - share)^2` turns it into the difference: that
is least squares with one intercept per stratum, done in one pass. Strata (the step, the load, the length) thus compare
like with like, and a drifting day drops out because the running means drift with it. Within a stratum, share and mean
also follow the exact load along a line (the theorem of Frisch, Waugh and Lovell: take the line out of both sides):
octaves of load alone left a difference of 4 % between equal servers, since one of them had a heavier user.

The variance of the sum is then taken over clusters: the sum of squares of *sums per user*, and of *sums per block
of time* (neighbouring blocks may resemble each other: Newey & West 1987), and combined as users + blocks - single
scores (Cameron, Gelbach & Miller 2011, "Robust inference with multiway clustering"), never below any of the three
(failures: never below the last, to keep what little there is to count). Scores are centred by the running estimate,
or a real difference would look like dependence. A small number of blocks makes any such variance too small; `1 + 12
/ blocks` follows the quantiles of Student's t at the thresholds used here.

A heavy user teaches little after many requests, so the k-th request of a unit counts `1 / (1 + discount * k)^2`: the
total then saturates at 1 / discount, as the optimal weight of a cluster does. Memory is bounded: units are hashed into
`_UNITS` groups (a coarser cluster is still a valid one), blocks need only the current sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["Sums"]

_UNITS: Final = 4096
_MEMORY: Final = 200  # requests that a stratum's running mean and share look back on
_SHARE_PRIOR: Final = 20  # requests that the configured weight counts for in the running share
_EFFECT_PRIOR: Final = 1.0
_LOAD_PRIOR: Final = 0.005  # variance of the load (in octaves) below which no line is believed
_FEW_BLOCKS: Final = 12.0


@dataclass
class Sums:
    """Running sums of one quantity. Serializable as it stands: plain numbers, dicts and lists.

    lingering: neighbouring blocks of time may resemble each other, as latencies do; failures come in bursts instead,
        which are dealt with before (`ledger.Bursts`), and an allowance for them would only be noise.
    """

    lingering: bool = True
    total: float = 0.0
    size: float = 0.0
    alone: float = 0.0
    by_unit: float = 0.0
    by_block: float = 0.0
    nominal: float = 0.0
    blocks: int = 0
    block: int | None = None
    block_sum: float = 0.0
    block_before: float = 0.0
    n_canary: int = 0
    n_stable: int = 0
    value_sum: float = 0.0
    cells: dict[str, list[float]] = field(default_factory=dict)  # stratum -> see `_learn`; of a level [n, mean]
    units: dict[str, list[float]] = field(default_factory=dict)  # group -> [sum of scores, step, requests by arm]

    @property
    def estimate(self) -> float:
        return self.total / self.size if self.size > 0.0 else 0.0

    @property
    def variance(self) -> float:
        """Squared standard error of the estimate; 0 while there is nothing to estimate it from."""
        if self.size <= 0.0 or not self.blocks:
            return 0.0
        return self._clustered * (1.0 + _FEW_BLOCKS / self.blocks) / self.size**2

    @property
    def design_effect(self) -> float:
        """How many times larger the variance is than if every request, at its weight, were independent."""
        return self._clustered / self.nominal if self.nominal > 0.0 else 1.0

    @property
    def mean_value(self) -> float:
        """Plain mean over both arms."""
        n = self.n_canary + self.n_stable
        return self.value_sum / n if n else 0.0

    @property
    def _clustered(self) -> float:
        together = self.by_unit + self.by_block - self.alone
        if not self.lingering:
            return max(self.alone, together)
        return max(self.by_unit, self.by_block, self.alone, together)

    def add_contrast(
        self, value: float, *, canary: bool, weight_ratio: float, stratum: str, unit: int | None, step: int,
        block: int, discount: float, load: float = 0.0,
    ) -> float:  # fmt: skip
        """One request of either arm; `weight_ratio` is the canary's configured share. Returns the request's weight."""
        self._enter(block)
        weight = self._weigh(unit, step, canary, discount)
        cell = self.cells.setdefault(stratum, [0.0, value, weight_ratio, load, 0.0, 0.0, 0.0])
        if cell[0]:
            mean, share = _expected(cell, load)
            contrast = float(canary) - share
            effect = self.total / (self.size + _EFFECT_PRIOR)
            self._cluster(weight * contrast * (value - mean - effect * contrast), weight, unit)
            self.total += weight * contrast * (value - mean)
            self.size += weight * contrast * contrast
        self._count(value, canary)
        _learn(cell, value, float(canary), load)
        return weight

    def add_level(self, value: float, *, unit: int | None, step: int, block: int, discount: float) -> None:
        """One measurement that needs no other arm: it is already a comparison with the reference, or within a pair."""
        self._enter(block)
        weight = self._weigh(unit, step, True, discount)
        n, mean = self.cells.get("", [0.0, value])
        if n:
            self._cluster(weight * (value - mean), weight, unit)
        self.total += weight * value
        self.size += weight
        self._count(value, True)
        self.cells[""] = [n + 1.0, mean + (value - mean) / min(n + 1.0, _MEMORY)]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def _weigh(self, unit: int | None, step: int, canary: bool, discount: float) -> float:
        if unit is None:
            return 1.0
        group = self.units.setdefault(str(unit % _UNITS), [0.0, step, 0.0, 0.0])
        if group[1] != step:
            group[1:] = [step, 0.0, 0.0]
        arm = 2 + canary
        group[arm] += 1.0
        return 1.0 / (1.0 + discount * (group[arm] - 1.0)) ** 2

    def _cluster(self, score: float, weight: float, unit: int | None) -> None:
        square = score * score
        self.alone += square
        self.nominal += square / weight
        held = 0.0
        if unit is not None:
            group = self.units[str(unit % _UNITS)]
            held, group[0] = group[0], group[0] + score
        self.by_unit += 2.0 * held * score + square
        self.by_block += 2.0 * (self.block_sum + self.block_before) * score + square
        self.block_sum += score

    def _enter(self, block: int) -> None:
        """Blocks only move forward: what comes late joins the current one, which errs on the side of caution."""
        if self.block is None or block > self.block:
            self.block_before = self.block_sum if self.lingering and block - 1 == self.block else 0.0
            self.block, self.block_sum, self.blocks = block, 0.0, self.blocks + 1

    def _count(self, value: float, canary: bool) -> None:
        self.n_canary += canary
        self.n_stable += not canary
        self.value_sum += value


def _expected(cell: list[float], load: float) -> tuple[float, float]:
    """(mean, share) at this load, from what the stratum has seen so far."""
    n, mean, share, mean_load, spread, with_value, with_arm = cell
    if spread <= 0.0:
        return mean, share
    # A slope is believed the more, the more requests and the more unlike their loads.
    step = (load - mean_load) / (spread + _LOAD_PRIOR) * n / (n + _SHARE_PRIOR)
    return mean + with_value * step, min(max(share + with_arm * step, 0.0), 1.0)


def _learn(cell: list[float], value: float, arm: float, load: float) -> None:
    """Move the running moments [n, mean, share, mean load, var(load), cov(load, value), cov(load, arm)]."""
    n, mean, share, mean_load, spread, with_value, with_arm = cell
    rate = 1.0 / min(n + 1.0, _MEMORY)
    slow = 1.0 / min(n + 1.0 + _SHARE_PRIOR, _MEMORY)
    off_value, off_arm, off_load = value - mean, arm - share, load - mean_load
    cell[:] = [
        n + 1.0,
        mean + rate * off_value,
        share + slow * off_arm,
        mean_load + rate * off_load,
        (1.0 - rate) * (spread + rate * off_load * off_load),
        (1.0 - rate) * (with_value + rate * off_load * off_value),
        (1.0 - rate) * (with_arm + rate * off_load * off_arm),
    ]
