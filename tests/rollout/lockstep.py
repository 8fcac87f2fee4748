"""The judge's arithmetic for thousands of rollouts at once: a numpy axis where serve/rollout has plain floats.

Only speed is new here, and that the judge may look after every single outcome of every rollout.
`test_lockstep_is_the_real_judge` feeds the same outcomes to the real evidence and judge, and compares every number.
All arrays are `[guards, rollouts]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np

from serve.rollout.measures import LATENCIES, MEASURES
from serve.rollout.plan import Plan
from serve.rollout.sequential import RATE_RATIOS
from tests.rollout.simulation import Arrivals, Bools, Effect, Floats, Ints, Steps, World, simulate

_MEMORY, _SHARE_PRIOR, _EFFECT_PRIOR, _FEW_BLOCKS = 200.0, 20.0, 1.0, 12.0
_STRATA = 160
_SUMS = (
    "total", "size", "alone", "by_unit", "by_block", "nominal", "blocks", "block_sum", "block_before", "n_canary",
    "n_stable", "value_sum",
)  # fmt: skip
_MOMENTS = ("cell_n", "cell_mean", "cell_share", "cell_load", "cell_spread", "cell_value", "cell_arm")
_LOAD_PRIOR = 0.005
_PASS_EVERY = 20  # a promotion may wait for its next look, a rollback may not


@dataclass(frozen=True)
class Fates:
    """What became of each rollout. Indices of requests, -1 for never; `per_arm`: requests of the smaller arm then."""

    failed_at: Ints
    passed_at: Ints
    guard: list[str]
    failed_per_arm: Ints
    log_e: Floats  # `[rollouts]`, merged, at the end
    harm: Floats
    safe: Floats

    def failed(self, per_arm: int | None = None) -> float:
        """Share of rollouts that were rolled back, within so many requests of the smaller arm."""
        early = self.failed_per_arm <= (np.inf if per_arm is None else per_arm)
        return float(((self.failed_at >= 0) & early).mean())

    @property
    def promoted(self) -> float:
        return float((self.passed_at >= 0).mean())


def play(
    plan: Plan,
    world: World,
    effect: Effect,
    *,
    rollouts: int,
    requests: int,
    steps: Steps,
    seed: int,
    to_the_end: bool = False,
) -> Fates:
    """Simulate, and look after every outcome. A rollout ends at the first harm, or the first pass in the last step."""
    judge = _Judge(plan, world, rollouts, steps)
    nothing = np.full(rollouts, -1)
    failed_at, passed_at, per_arm = nothing.copy(), nothing.copy(), nothing.copy()
    guard = [""] * rollouts
    threshold = -log(plan.alpha)
    for index, arrivals in enumerate(
        simulate(world, effect, rollouts=rollouts, requests=requests, steps=steps, seed=seed)
    ):
        judge.take(arrivals)
        running = (failed_at < 0) & (passed_at < 0)
        if not running.any() and not to_the_end:
            break
        suspects = np.flatnonzero(running & (np.logaddexp.reduce(judge.parts + judge.harm(bound=True)) >= threshold))
        if suspects.size:
            parted = judge.parts + judge.harm()[:, suspects]
            for rollout, column in zip(suspects, parted.T, strict=True):
                if np.logaddexp.reduce(column) >= threshold:
                    failed_at[rollout] = index
                    per_arm[rollout] = min(judge.n_canary[0, rollout], judge.n_stable[0, rollout])
                    guard[rollout] = judge.names[int(column.argmax())]
        if index % _PASS_EVERY == 0 and arrivals.step == len(steps) - 1:
            passed_at[running & (failed_at < 0) & (judge.safe() >= threshold).all(axis=0)] = index
    harm = judge.harm()
    return Fates(failed_at, passed_at, guard, per_arm, np.logaddexp.reduce(judge.parts + harm), harm, judge.safe())


class _Judge:
    def __init__(self, plan: Plan, world: World, rollouts: int, steps: Steps) -> None:
        self.plan, self.steps, self.step = plan, steps, -1
        self.names = list(plan.guards)
        self.measures = [MEASURES[name] for name in self.names]
        shape = (len(self.names), rollouts)
        self.shape = shape
        self.pairs = np.arange(shape[0] * rollouts).reshape(shape)
        self.level = _column(measure.kind == "level" for measure in self.measures).astype(bool)
        self.loaded = _column(name in ("ttft", "itl", "e2e") for name in self.names).astype(bool)
        self.rate = np.array([measure.kind == "rate" for measure in self.measures])
        self.two_sided = np.array([measure.two_sided for measure in self.measures])
        self.discount = _column(measure.discount for measure in self.measures)
        limits = [plan.guards[name].limits(MEASURES[name]) for name in self.names]
        self.tolerance, self.margin = (_column(limit[side] for limit in limits) for side in (0, 1))
        self.scale = _column(plan.guards[name].scale(MEASURES[name]) for name in self.names)
        weights = _column(plan.guards[name].weight for name in self.names)
        self.parts = np.log(weights / weights.sum())
        self.units = 0 if world.zipf == 0.0 else world.users
        for name in _SUMS:
            setattr(self, name, np.zeros(shape))
        self.block = np.full(shape, -1.0)
        self.unit_sum = np.zeros(self.pairs.size * max(self.units, 1))
        cells = self.pairs.size * _STRATA
        for name in _MOMENTS:
            setattr(self, name, np.zeros(cells))
        self.bursts = _Bursts(rollouts)
        self.tables: list[Floats] = []  # per step `[4, rollouts]`

    def take(self, arrivals: Arrivals) -> None:
        if arrivals.step != self.step:
            self._begin(arrivals.step)
        value, keep, stratum = self._read(arrivals)
        canary = arrivals.arm == 1
        block = np.floor(arrivals.time_s / self.plan.block_s)
        share = self.steps[self.step][1] / 100.0
        news = self.bursts.admit(arrivals.failed, arrivals.arm, block, np.where(canary, share, 1.0 - share))
        value[self.rate] = news
        octaves = np.where(self.loaded, np.log2(arrivals.running + 1.0), 0.0)
        weight = self._add(value, keep, stratum, canary, block, arrivals.user, octaves)
        counted = weight[self.names.index("error_rate")]
        self.tables[-1] += counted * np.stack([news & canary, news & ~canary, canary, ~canary])

    def harm(self, *, bound: bool = False) -> Floats:
        """Bets against "no worse than tolerated"; with `bound` quickly, and at most a little too large."""
        estimate, variance, enough = self._estimate()
        two = self.two_sided
        harm = _harm(estimate - self.tolerance, variance, self.scale, bound)
        other = _harm(-estimate[two] - self.tolerance[two], variance[two], self.scale[two], bound)
        harm[two] = np.logaddexp(harm[two], other) - log(2.0)
        harm = np.where(enough, harm, 0.0)
        nominal, clustered = self.nominal[self.rate], self._clustered()[self.rate]
        effect = np.where(nominal > 0, clustered / np.maximum(nominal, 1e-100), 1.0)
        harm[self.rate] = self._rate_ratio(effect[0])
        return harm

    def safe(self) -> Floats:
        """Bets against "worse than the margin"."""
        estimate, variance, enough = self._estimate()
        two = self.two_sided
        safe = _mixture(self.margin - estimate, variance, self.scale)
        safe[two] = np.minimum(safe[two], _mixture(self.margin[two] + estimate[two], variance[two], self.scale[two]))
        return np.where(enough, safe, 0.0)

    def _estimate(self) -> tuple[Floats, Floats, Bools]:
        size = np.maximum(self.size, 1e-100)
        variance = self._clustered() * (1.0 + _FEW_BLOCKS / np.maximum(self.blocks, 1.0)) / size**2
        n = (self.n_canary + self.n_stable)[self.rate]
        p = (self.value_sum[self.rate] + 1.0) / (n + 2.0)
        variance[self.rate] = np.maximum(variance[self.rate], p * (1.0 - p) / size[self.rate])
        enough = (self.n_canary >= 50) & ((self.n_stable >= 50) | self.level) & (self.blocks >= 5)
        variance = np.maximum(variance, np.square(0.01 * self.scale))
        return self.total / size, variance, enough

    def _clustered(self) -> Floats:
        together = self.by_unit + self.by_block - self.alone
        either = np.where(self.rate[:, None], 0.0, np.maximum(self.by_unit, self.by_block))
        return np.maximum(either, np.maximum(self.alone, together))

    def _begin(self, step: int) -> None:
        self.step = step
        fresh = np.repeat(~self.level[:, 0], self.shape[1] * _STRATA)  # levels go on: they need no second arm
        for name in _MOMENTS:
            getattr(self, name)[fresh] = 0.0
        self.cell_share[fresh] = self.steps[step][1] / 100.0
        self.unit_count = np.zeros_like(self.unit_sum)
        self.tables.append(np.zeros((4, self.shape[1])))

    def _read(self, a: Arrivals) -> tuple[Floats, Bools, Ints]:
        ok = ~a.failed
        load, prompt = _bucket(a.running + 1, 2.0, 8), _bucket(a.prompt_tokens, 2.0, 17)
        answer = _bucket(a.completion_tokens, 1.5, 20)
        zero = np.zeros_like(load)
        rows = {
            "error_rate": (a.failed, np.ones_like(ok), zero),
            "ttft": (np.log(a.ttft_s), ok, 20 * load + prompt),
            "itl": (np.log(a.itl_s), ok, load),
            "e2e": (np.log(a.e2e_s), ok, 20 * load + answer),
            "e2e_own_load": (np.log(a.e2e_s), ok, answer),
            "output_length": (np.log(a.completion_tokens), ok, zero),
            "kl_divergence": (a.kl_nats, ~np.isnan(a.kl_nats), zero),
            "top1_agreement": (-a.top1, ~np.isnan(a.top1), zero),
            "flips": (a.flipped, ~np.isnan(a.flipped), zero),
        }
        values, keeps, strata = zip(*(rows[name] for name in self.names), strict=True)
        keep = np.stack(keeps)
        keep[[name in LATENCIES for name in self.names]] &= ~a.settling
        return np.where(keep, np.stack(values), 0.0).astype(float), keep, np.stack(strata)

    def _add(
        self, value: Floats, keep: Bools, stratum: Ints, canary: Bools, block: Floats, user: Ints, load: Floats
    ) -> Floats:
        new = keep & (block > self.block)
        next_door = new & (block == self.block + 1.0) & ~self.rate[:, None]
        self.block_before = np.where(new, np.where(next_door, self.block_sum, 0.0), self.block_before)
        self.block_sum[new] = 0.0
        self.blocks += new
        self.block = np.where(new, block, self.block)
        weight = np.ones(self.shape)
        if self.units:
            unit = self.pairs * self.units + user
            weight = 1.0 / (1.0 + self.discount * self.unit_count[unit]) ** 2
            self.unit_count[unit] += keep
        cell = self.pairs * _STRATA + stratum
        n, mean, share, middle, spread, with_value, with_arm = (getattr(self, name)[cell] for name in _MOMENTS)
        middle, off = np.where(n > 0, middle, load), np.where(n > 0, value - mean, 0.0)
        known = keep & (n > 0)
        step = np.where(spread > 0, (load - middle) / (spread + _LOAD_PRIOR) * n / (n + _SHARE_PRIOR), 0.0)
        expected = mean + with_value * step
        contrast = np.where(self.level, 1.0, canary - np.clip(share + with_arm * step, 0.0, 1.0))
        effect = np.where(self.level, 0.0, self.total / (self.size + _EFFECT_PRIOR))
        score = np.where(known, weight * contrast * (value - expected - effect * contrast), 0.0)
        self._cluster(score, weight, unit if self.units else None)
        counted = np.where(self.level, keep, known)
        self.total += np.where(counted, weight * contrast * (value - np.where(self.level, 0.0, expected)), 0.0)
        self.size += np.where(counted, weight * contrast * contrast, 0.0)
        rate = 1.0 / np.minimum(n + 1.0, _MEMORY)
        slow = 1.0 / np.minimum(n + 1.0 + _SHARE_PRIOR, _MEMORY)
        apart, away = load - middle, canary - share
        moments = (
            n + 1.0,
            np.where(n > 0, mean + rate * off, value),
            share + slow * away,
            middle + rate * apart,
            (1.0 - rate) * (spread + rate * apart * apart),
            (1.0 - rate) * (with_value + rate * apart * off),
            (1.0 - rate) * (with_arm + rate * apart * away),
        )
        chosen = cell[keep]
        for name, moment in zip(_MOMENTS, moments, strict=True):
            getattr(self, name)[chosen] = moment[keep]
        self.n_canary += keep & canary
        self.n_stable += keep & ~canary
        self.value_sum += value
        return weight

    def _cluster(self, score: Floats, weight: Floats, unit: Ints | None) -> None:
        square = score * score
        self.alone += square
        self.nominal += square / weight
        held = np.zeros(self.shape) if unit is None else self.unit_sum[unit]
        if unit is not None:
            self.unit_sum[unit] = held + score
        self.by_unit += 2.0 * held * score + square
        self.by_block += 2.0 * (self.block_sum + self.block_before) * score + square
        self.block_sum += score

    def _rate_ratio(self, effect: Floats) -> Floats:
        terms = []
        for theta, coin in RATE_RATIOS:
            ratio = np.zeros(self.shape[1])
            for failed, failed_stable, n, n_stable in self.tables:
                both = (n > 0) & (n_stable > 0)
                share = n / np.maximum(n + n_stable, 1e-300)
                one = failed * log(theta) - (failed + failed_stable) * np.log(theta * share + 1.0 - share)
                ratio += np.where(both, one, 0.0)
            terms.append(log(coin) + ratio / effect)
        return np.logaddexp.reduce(terms)


class _Bursts:
    def __init__(self, rollouts: int) -> None:
        self.every = np.arange(rollouts)
        self.here = np.zeros((rollouts, 2))
        self.block, self.closed, self.blocks = np.full(rollouts, -1.0), np.zeros(rollouts), np.ones(rollouts)

    def admit(self, failed: Bools, arm: Ints, block: Floats, share: Floats) -> Bools:
        new = block > self.block
        self.closed += np.where(new, self.here.sum(axis=1), 0.0)
        self.here[new] = 0.0
        self.blocks += new
        self.block = np.where(new, block, self.block)
        news = failed & (self.here[self.every, arm] < 3.0 + 3.0 * self.closed / self.blocks * share)
        self.here[self.every, arm] += news
        return news


def _column(values: object) -> Floats:
    return np.array(list(values), dtype=float)[:, None]  # type: ignore[call-overload]


def _bucket(value: Floats | Ints, base: float, count: int) -> Ints:
    return np.minimum((np.log(np.maximum(value, 1.0)) / log(base) + 1e-9).astype(np.int64), count - 1)


def _harm(excess: Floats, variance: Floats, scale: Floats, bound: bool) -> Floats:
    """`harm_log_e` on arrays."""
    near, far = (_mixture(excess, variance, size * scale, bound) for size in (1.0, 5.0))
    return np.logaddexp(near + log(0.75), far + log(0.25))


def _mixture(excess: Floats, variance: Floats, scale: Floats, bound: bool = False) -> Floats:
    """`normal_mixture_log_e` on arrays; with `bound` a twice normal cdf of at most 2 is taken for 2."""
    safe = np.maximum(variance, 1e-100)
    shrink = safe + scale * scale
    z2 = np.square(excess * scale) / (safe * shrink)
    log_e = 0.5 * np.log(safe / shrink) + 0.5 * z2
    if bound:
        return np.where(excess > 0.0, log_e + log(2.0), 0.0)
    z = np.sign(excess) * np.sqrt(z2)
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(z < -30.0, -100.0, log_e + np.log(_erfc(-z / np.sqrt(2.0))))


def _erfc(x: Floats) -> Floats:
    """Numerical Recipes' Chebyshev fit, relative error below 1.2e-7."""
    z = np.abs(x)
    t = 1.0 / (1.0 + 0.5 * z)
    poly = np.zeros_like(t)
    for c in (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196,
              1.00002368, -1.26551223):  # fmt: skip
        poly = poly * t + c
    tail = t * np.exp(-z * z + poly)
    return np.where(x >= 0.0, tail, 2.0 - tail)
