"""How many requests a plan will need before it can decide, worked out before it starts.

An estimate lies within its margin at once when the bet on what is left of the margin pays 1/alpha; to be right with the
wished-for power on top, it must pay even when the estimate is off by the power's own quantile. Its standard error is
the deviation of one request times sqrt(design effect / n): what a request deviates by, and how much users and queues
take away from its worth, are the assumptions here, and `certify` measures them on recorded traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, inf, log, sqrt
from statistics import NormalDist
from typing import Any

from serve.rollout.measures import MEASURES, Measure
from serve.rollout.plan import Guard, Plan
from serve.rollout.sequential import normal_mixture_log_e

__all__ = ["Estimate", "Need", "Traffic", "estimate"]


@dataclass(frozen=True)
class Traffic:
    """What is assumed of the traffic.

    deviations: of one request within its stratum, by guard, on the scale it is summed on (logarithms for latencies).
    drift_sample_rate: share of the canary's answers that are scored against the reference.
    """

    requests_per_s: float = 1.0
    error_rate: float = 0.01
    design_effect: float = 2.0
    failure_design_effect: float = 1.2
    drift_sample_rate: float = 0.05
    deviations: Mapping[str, float] | None = None

    def deviation(self, measure: Measure, guard: Guard) -> float:
        if self.deviations and measure.name in self.deviations:
            return self.deviations[measure.name]
        if measure.kind == "rate":
            return sqrt(self.error_rate * (1.0 - self.error_rate))
        if measure.kind == "level":  # answers scatter by about as much as their mean
            return max(abs(guard.expected), guard.margin) if measure.sign > 0 else 0.05
        return {"ttft": 0.5, "itl": 0.25, "e2e": 0.35}.get(measure.name, 0.6)


@dataclass(frozen=True)
class Need:
    """Canary requests for one guard: to pass where nothing differs, and to fail where it is `harm` times the margin."""

    guard: str
    pass_requests: int
    fail_requests: int
    harm: float


@dataclass(frozen=True)
class Estimate:
    """The whole plan. `canary_requests` until every guard passes; `seconds` at the traffic's rate, waits included."""

    needs: tuple[Need, ...]
    canary_requests: int
    total_requests: int
    seconds: float
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(plan: Plan, traffic: Traffic) -> Estimate:
    """Requests and time to a promotion when the canary is like stable."""
    share = plan.steps[-1].weight / 100.0
    needs = tuple(_need(plan, MEASURES[name], guard, traffic, share) for name, guard in plan.guards.items())
    wanted = max(need.pass_requests for need in needs)
    canary, total, seconds = _walk(plan, traffic, wanted)
    slowest = max(needs, key=lambda need: need.pass_requests)
    sentence = (
        f"about {canary} requests to {plan.canary} ({total} in all, {_span(seconds)} at "
        f"{traffic.requests_per_s:g} requests/s) when it is like {plan.stable}; {slowest.guard} takes longest"
    )
    return Estimate(needs, canary, total, seconds, sentence)


def _need(plan: Plan, measure: Measure, guard: Guard, traffic: Traffic, share: float) -> Need:
    tolerance, margin = guard.limits(measure)
    deviation, sampled = traffic.deviation(measure, guard), 1.0
    where = 0.0
    if measure.kind == "level":
        sampled, share = traffic.drift_sample_rate, 0.0
        where = measure.sign * guard.expected
        where = log(1.0 + where) if measure.ratio else where
    worth = traffic.failure_design_effect if measure.kind == "rate" else traffic.design_effect
    unit = deviation**2 * worth / (1.0 - share)
    scale = guard.scale(measure)
    part = guard.weight / sum(other.weight for other in plan.guards.values())
    harm = 2.0
    bad = harm * (margin - where) + where
    if measure.kind == "rate":  # a doubled rate
        bad, unit_bad = traffic.error_rate, 1.5 * unit
    else:
        unit_bad = unit
    passes = _requests(margin - where, unit, scale, plan.alpha, plan.power)
    fails = _requests(bad - tolerance, unit_bad, scale, plan.alpha * part, plan.power)
    return Need(measure.name, ceil(passes / sampled), ceil(fails / sampled), harm)


def _requests(gap: float, unit: float, scale: float, alpha: float, power: float) -> float:
    """The n at which unit / n is a small enough variance to see over `gap`."""
    if gap <= 0.0:
        return inf
    extra = NormalDist().inv_cdf(power)
    low, high = 1.0, 1e12
    for _ in range(80):
        middle = sqrt(low * high)
        variance = unit / middle
        enough = normal_mixture_log_e(gap - extra * sqrt(variance), variance, scale) >= -log(alpha)
        low, high = (low, middle) if enough else (middle, high)
    return high


def _walk(plan: Plan, traffic: Traffic, wanted: int) -> tuple[int, int, float]:
    """Through the steps at this rate: (canary requests, all requests, seconds)."""
    rate = traffic.requests_per_s
    seconds = canary = 0.0
    if plan.shadow:
        seconds = max(plan.shadow.hold_s, plan.shadow.min_samples / (rate * plan.shadow.rate))
    for index, step in enumerate(plan.steps):
        flow = rate * step.weight / 100.0
        least = max(step.hold_s, step.min_samples / flow)
        if index == len(plan.steps) - 1:
            least = max(least, (wanted - canary) / flow)
        seconds, canary = seconds + least, canary + least * flow
    return ceil(canary), ceil(seconds * rate), seconds


def _span(seconds: float) -> str:
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"
