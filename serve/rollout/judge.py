"""From evidence to a verdict: pure, and without a clock. A verdict is a fact to be acted upon elsewhere.

The order matters. First the **hard guards**: a crash, a NaN, an answer to nobody need no statistics. Then **harm**:
every guard bets against "no worse than tolerated" (see `sequential`), the bets are averaged, and at 1/alpha the canary
is worse, however often we looked. Then **non-inferiority**: every single guard must exclude its margin with an e-value
of 1/alpha of its own; all must, so nothing is gained by having many. Whatever is left is **inconclusive**, an answer
too: more traffic, or a person, will tell. Where nothing was seen, nothing is said: no data is no verdict either way.

A promotion also wants the realised split to be the configured one (a broken assignment explains any difference), and
no more than a hundredth of the records lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import exp, log, sqrt
from typing import Any, Final, Literal

from serve.rollout.evidence import Evidence
from serve.rollout.measures import MEASURES, Measure
from serve.rollout.plan import Guard, Plan
from serve.rollout.sequential import (
    beta_binomial_log_e,
    critical_z,
    harm_log_e,
    merge,
    normal_mixture_log_e,
    rate_ratio_log_e,
)
from serve.rollout.sums import Sums

__all__ = ["Finding", "Result", "Verdict", "judge"]

Result = Literal["pass", "fail", "inconclusive", "no_data"]

_MIN_PER_ARM: Final = 50
_MIN_BLOCKS: Final = 5
_SPLIT_ALPHA: Final = 0.001
_LEAST_ERROR: Final = 0.01  # of a margin: nothing is known more exactly, however alike the values
_LOST_RATIO: Final = 0.01


@dataclass(frozen=True)
class Finding:
    """What one guard says, in its own unit; ratios as a relative change.

    log_e_harm: natural log of the bet against "no worse than `tolerance`"; log_e_safe: against "worse than `margin`".
    [low, high] holds the truth at all times, each side with probability 1 - alpha; None while there is too little.
    """

    guard: str
    result: Result
    log_e_harm: float
    log_e_safe: float
    estimate: float | None
    low: float | None
    high: float | None
    tolerance: float
    margin: float
    n_canary: int
    n_stable: int
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """All findings, and what follows from them. `guard` is the decisive one, where one decided."""

    result: Result
    sentence: str
    guard: str | None
    log_e_value: float
    n_canary: int
    n_stable: int
    findings: tuple[Finding, ...]
    blockers: tuple[str, ...] = ()

    @property
    def e_value(self) -> float:
        return exp(min(self.log_e_value, 700.0))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "e_value": self.e_value}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Verdict:
        values = {key: value for key, value in mapping.items() if key != "e_value"}
        findings = tuple(Finding(**finding) for finding in values.pop("findings"))
        return cls(**{**values, "findings": findings, "blockers": tuple(values.get("blockers", ()))})


def judge(plan: Plan, evidence: Evidence) -> Verdict:
    """The verdict on everything seen so far."""
    findings = tuple(_find(plan, MEASURES[name], guard, evidence) for name, guard in plan.guards.items())
    parts = _parts(plan)
    merged = merge({finding.guard: finding.log_e_harm for finding in findings}, parts)
    n_canary, n_stable = evidence.n()

    def verdict(result: Result, sentence: str, guard: str | None = None, blockers: tuple[str, ...] = ()) -> Verdict:
        return Verdict(result, sentence, guard, merged, n_canary, n_stable, findings, blockers)

    if hard := _hard_failure(plan, evidence):
        return verdict("fail", hard[1], hard[0])
    if merged >= -log(plan.alpha):
        worst = max(findings, key=lambda finding: log(parts[finding.guard]) + finding.log_e_harm)
        return verdict("fail", f"{plan.canary} is worse than {plan.stable}: {worst.sentence}", worst.guard)
    if n_canary == 0:
        return verdict("no_data", f"no request of {plan.canary} has finished yet")
    blockers = _blockers(plan, evidence)
    open_guards = [finding for finding in findings if finding.result != "pass"]
    if not open_guards and not blockers:
        return verdict("pass", f"{plan.canary} is within every margin of {plan.stable}")
    waiting = "; ".join([*blockers, *(finding.sentence for finding in open_guards)])
    return verdict("inconclusive", f"not yet decided: {waiting}", blockers=blockers)


def _find(plan: Plan, measure: Measure, guard: Guard, evidence: Evidence) -> Finding:
    tolerance, margin = guard.limits(measure)
    estimate, variance = _estimate(measure, guard, evidence)
    harm, safe = _bets(measure, evidence, estimate, variance, guard)
    low, high = None, None
    if _enough(measure, evidence):
        half = critical_z(variance, guard.scale(measure), plan.alpha) * sqrt(variance)
        low, high = sorted((measure.shown(estimate - half), measure.shown(estimate + half)))
    sums = evidence.sums[measure.name]
    seen = sums.n_canary + (evidence.paired[measure.name].n_canary if measure.name in evidence.paired else 0)
    finding = Finding(
        guard=measure.name,
        result=_result(plan.alpha, _parts(plan)[measure.name], seen, harm, safe),
        log_e_harm=harm,
        log_e_safe=safe,
        estimate=measure.shown(estimate) if seen else None,
        low=low,
        high=high,
        tolerance=measure.shown(tolerance),
        margin=measure.shown(margin),
        n_canary=sums.n_canary,
        n_stable=sums.n_stable,
        sentence="",
    )
    return replace(finding, sentence=_sentence(measure, finding))


def _bets(measure: Measure, evidence: Evidence, estimate: float, variance: float, guard: Guard) -> tuple[float, float]:
    """(log e against "no worse than tolerated", log e against "worse than the margin")."""
    tolerance, margin = guard.limits(measure)
    scale = guard.scale(measure)
    harm = safe = 0.0
    if _enough(measure, evidence):
        harm = harm_log_e(estimate - tolerance, variance, scale)
        safe = normal_mixture_log_e(margin - estimate, variance, scale)
        if measure.two_sided:
            harm = _mean_of(harm, harm_log_e(-estimate - tolerance, variance, scale))
            safe = min(safe, normal_mixture_log_e(margin + estimate, variance, scale))
    if measure.kind == "rate":  # counts are judged from the first failure on, not only when a normal law holds
        tables = evidence.tables.get(measure.name, {}).values()
        effect = evidence.sums[measure.name].design_effect
        harm = rate_ratio_log_e(((row[0], row[1], row[2], row[3]) for row in tables), effect)
    return harm, safe


def _estimate(measure: Measure, guard: Guard, evidence: Evidence) -> tuple[float, float]:
    """The difference (or level) and its variance; arms and mirrored pairs weighted by their precision."""
    sums = evidence.sums[measure.name]
    least = (_LEAST_ERROR * guard.scale(measure)) ** 2
    variance = max(sums.variance, least)
    if measure.kind == "rate" and sums.size > 0.0:
        n = sums.n_canary + sums.n_stable
        rate = (sums.mean_value * n + 1.0) / (n + 2.0)  # no failure seen does not mean that none can happen
        variance = max(variance, rate * (1.0 - rate) / sums.size)
    pairs = evidence.paired.get(measure.name)
    if pairs is None or not _plenty(pairs, two_arms=False):
        return sums.estimate, variance
    if not _plenty(sums, two_arms=True):
        return pairs.estimate, max(pairs.variance, least)
    precisions = 1.0 / variance, 1.0 / max(pairs.variance, least)
    both = sum(precisions)
    return (sums.estimate * precisions[0] + pairs.estimate * precisions[1]) / both, 1.0 / both


def _enough(measure: Measure, evidence: Evidence) -> bool:
    """The guarantees of a normal mixture begin with some units and some time; before, it stays silent."""
    pairs = evidence.paired.get(measure.name)
    if pairs is not None and _plenty(pairs, two_arms=False):
        return True
    return _plenty(evidence.sums[measure.name], two_arms=measure.kind != "level")


def _plenty(sums: Sums, *, two_arms: bool) -> bool:
    enough = sums.n_canary >= _MIN_PER_ARM and (sums.n_stable >= _MIN_PER_ARM or not two_arms)
    return enough and sums.blocks >= _MIN_BLOCKS


def _result(alpha: float, part: float, seen: int, harm: float, safe: float) -> Result:
    if not seen:
        return "no_data"
    if harm >= -log(alpha * part):
        return "fail"
    return "pass" if safe >= -log(alpha) else "inconclusive"


def _parts(plan: Plan) -> dict[str, float]:
    whole = sum(guard.weight for guard in plan.guards.values())
    return {name: guard.weight / whole for name, guard in plan.guards.items()}


def _hard_failure(plan: Plan, evidence: Evidence) -> tuple[str, str] | None:
    counted = (
        ("crash", evidence.hard.get("replica_died", 0), plan.hard.crashes, "replica died"),
        ("out_of_memory", evidence.hard.get("oom", 0), plan.hard.out_of_memory, "ran out of memory"),
        (
            "nan",
            evidence.hard.get("nan", 0) + evidence.nonfinite_tokens,
            plan.hard.nonfinite_tokens,
            "produced numbers that are not finite",
        ),
        ("unresponsive", evidence.failures_in_a_row, plan.hard.failures_in_a_row, "failed without a success between"),
    )
    for kind, count, limit, what in counted:
        if count >= limit:
            return kind, f"{plan.canary} {what}: {count} times, the limit is {limit}"
    return None


def _blockers(plan: Plan, evidence: Evidence) -> tuple[str, ...]:
    found = []
    weights = {str(step.index): step.weight for step in evidence.steps}
    dealt = [(n, weights[key] / 100.0) for key, n in evidence.assigned.items() if 0.0 < weights[key] < 100.0]
    log_e = sum(beta_binomial_log_e(n[0], n[1], share) for n, share in dealt)
    if log_e >= -log(_SPLIT_ALPHA):
        realised = ", ".join(f"{100 * n[0] / sum(n):.1f} % for {100 * share:g} %" for n, share in dealt)
        found.append(f"the realised split is not the configured one ({realised} of the units, e = {exp(log_e):.3g})")
    lost = sum(evidence.lost.values())
    if lost > _LOST_RATIO * (lost + sum(evidence.n())):
        found.append(f"{lost} records were lost on the way")
    return tuple(found)


def _mean_of(one: float, other: float) -> float:
    return merge({"+": one, "-": other}, {"+": 0.5, "-": 0.5})


def _sentence(measure: Measure, finding: Finding) -> str:
    if finding.estimate is None:
        return f"{measure.label}: no data"
    interval = ""
    if finding.low is not None and finding.high is not None:
        interval = f", between {measure.text(finding.low)} and {measure.text(finding.high)}"
    limit = measure.text(finding.margin)
    limit = f"±{limit.lstrip('+')}" if measure.two_sided else limit
    what = {"fail": "worse", "pass": f"within {limit}"}.get(finding.result, f"limit {limit} not excluded")
    n = f"n = {finding.n_canary} canary" + (f", {finding.n_stable} stable" if measure.kind != "level" else "")
    e_value = exp(min(finding.log_e_harm, 700.0))
    return f"{measure.label} {measure.text(finding.estimate)}{interval}: {what} (e = {e_value:.3g}, {n})"
