"""What the operator asked for: the steps, the guards with their margins, and what to do when the evidence is silent.

A guard has two limits. Up to `tolerance` a difference is no reason to roll back: the harm test asks whether it is
*exceeded*. The `margin` is what must be *excluded* before a promotion. Between the two lies a zone where the plan takes
no side; a canary in it is promoted or rolled back by whichever becomes certain first. Errors have no tolerance.

Quality guards are judged against what the variant's own offline evaluation led one to expect: the limit is `expected`
plus the margin (minus, for an agreement), or the operator's `cap` where that is stricter. Live drift beyond the
expected means that something broke, also on small models, whose expected drift is large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import log1p
from typing import Any, Final, Literal

from serve.errors import ConfigError
from serve.rollout.measures import MEASURES, Measure
from serve.rollout.strict import check_keys, number

__all__ = ["Expected", "Gate", "Guard", "Hard", "Plan", "Shadow", "Step", "plan_for"]

Silence = Literal["hold", "rollback"]
Gate = Literal["none", "approval"]


@dataclass(frozen=True)
class Guard:
    """One measure and its limits.

    margin: for a rate, percentage points / 100; for TTFT, ITL, E2E, output length and perplexity a relative change; for
        the other levels, an absolute addition to `expected`.
    tolerance: the same unit; None means half the margin for latencies and lengths, none for rates, all for levels.
    expected, cap: only for levels (see above), in the measure's unit; a perplexity ratio of 1.03 is 0.03.
    weight: this guard's part of alpha; parts are scaled to sum to 1 over the guards of the plan.
    """

    margin: float
    tolerance: float | None = None
    expected: float = 0.0
    cap: float | None = None
    weight: float = 1.0

    def limits(self, measure: Measure) -> tuple[float, float]:
        """(tolerance, margin) on the scale that the measure is summed on: logarithms for ratios."""
        scale = log1p if measure.ratio else float
        if measure.kind == "level":
            limit = measure.sign * self.expected + self.margin
            if self.cap is not None:
                limit = min(limit, measure.sign * self.cap)
            return scale(limit), scale(limit)
        whole = scale(self.margin)
        if self.tolerance is not None:
            return scale(self.tolerance), whole
        return (0.0 if measure.kind == "rate" else whole / 2.0), whole

    def scale(self, measure: Measure) -> float:
        """The size of effect that the bets look for: about the margin."""
        return log1p(self.margin) if measure.ratio else max(self.margin, 1e-6)


@dataclass(frozen=True)
class Step:
    """Canary weight 0-100, kept for at least `hold_s` and `min_samples` canary requests, whatever the evidence says.

    gate: "approval" waits for a person after the step. evidence: what the step needs to end: "no_harm", or "pass", all
    guards proven within their margins; the last step before promotion always needs "pass".
    """

    weight: float
    min_samples: int = 200
    hold_s: float = 60.0
    gate: Gate = "none"
    evidence: Literal["no_harm", "pass"] = "no_harm"


@dataclass(frozen=True)
class Shadow:
    """Mirror a share `rate` (0-1) of the traffic to the canary before it serves anyone."""

    rate: float = 0.1
    min_samples: int = 200
    hold_s: float = 60.0


@dataclass(frozen=True)
class Hard:
    """What needs no statistics: limits that are reached are acted upon at once."""

    crashes: int = 1
    out_of_memory: int = 1
    nonfinite_tokens: int = 1
    failures_in_a_row: int = 20


@dataclass(frozen=True)
class Plan:
    """One rollout, from `stable` to `canary`.

    alpha: chance of a false rollback, over all guards and all looks; and, for each guard, of a false promotion.
    power: chance of a right decision that the dry run's estimate of needed requests is made for.
    on_inconclusive: when a step has waited `patience_s` for evidence, or the rollout `time_limit_s` in all.
    deadline_s: a request open for longer has failed.
    settle_s: latency is not compared so soon after a change of weight.
    block_s: requests closer in time than this may depend on each other. Longer than the queue remembers; no latency is
        judged before five blocks have passed.
    keep_canary_s: how long the canary is kept after a rollback, for inspection.
    free_stable: end the old variant after the promotion.
    """

    stable: str
    canary: str
    steps: tuple[Step, ...] = (Step(5.0), Step(25.0), Step(50.0))
    shadow: Shadow | None = None
    guards: Mapping[str, Guard] = field(default_factory=dict)
    hard: Hard = Hard()
    alpha: float = 0.05
    power: float = 0.9
    on_inconclusive: Silence = "hold"
    patience_s: float = 3600.0
    time_limit_s: float = 7 * 86400.0
    deadline_s: float = 120.0
    settle_s: float = 30.0
    block_s: float = 30.0
    keep_canary_s: float = 3600.0
    free_stable: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def max_weight(self) -> float:
        return max(step.weight for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Plan:
        """From YAML or JSON. Guards are merged over the defaults of `plan_for` only there; here they are the whole."""
        values = check_keys("rollout", mapping, cls)
        if "steps" in values:
            values["steps"] = tuple(_step(index, step) for index, step in enumerate(_list("steps", values["steps"])))
        if values.get("shadow") is not None:
            values["shadow"] = Shadow(**check_keys("rollout.shadow", values["shadow"], Shadow))
        if "hard" in values:
            values["hard"] = Hard(**check_keys("rollout.hard", values["hard"], Hard))
        if "guards" in values:
            values["guards"] = {name: _guard(name, guard) for name, guard in _items("guards", values["guards"])}
        return cls(**values)


@dataclass(frozen=True)
class Expected:
    """What the offline evaluation of the canary measured against the reference; None where it was not measured."""

    kl_divergence: float | None = None
    top1_agreement: float | None = None
    perplexity_ratio: float | None = None
    flips: float | None = None


# What a variant of a small model may be expected to lose where nobody has evaluated it; larger models lose less.
_TYPICAL: Final[Mapping[str, Expected]] = {
    "16-bit": Expected(0.001, 0.99),
    "int8": Expected(0.002, 0.98),
    "fp8": Expected(0.01, 0.95),
    "4-bit": Expected(0.06, 0.82),
    "other": Expected(0.15, 0.75),
}

_ALWAYS: Final[Mapping[str, Guard]] = {
    "error_rate": Guard(margin=0.01, weight=0.5),
    "degenerate": Guard(margin=0.02, weight=0.05),
    "ttft": Guard(margin=0.10, weight=0.09),
    "itl": Guard(margin=0.10, weight=0.09),
    "e2e": Guard(margin=0.10, weight=0.09),
    "e2e_own_load": Guard(margin=0.50, tolerance=0.25, weight=0.04),
    "output_length": Guard(margin=0.20, weight=0.04),
}


def plan_for(
    stable: str, canary: str, precision: str, expected: Expected | None = None, changes: Mapping[str, Any] | None = None
) -> Plan:
    """The default plan for a canary of this precision, with `changes` (as in YAML) over it.

    precision: a recipe's name such as "int8" or "gptq4-g64"; what quality to expect of it where `expected` is silent.
    A guard set to null in `changes` is left out; one given as a mapping changes only the keys that it names.
    """
    guards = {**_ALWAYS, **_quality_guards(expected or Expected(), _TYPICAL[_family(precision)])}
    values = {"stable": stable, "canary": canary, **(changes or {})}
    for name, change in _items("guards", values.pop("guards", {})):
        if change is None:
            guards.pop(name, None)
        else:
            base = asdict(guards[name]) if name in guards else {}
            guards[name] = _guard(name, {**base, **change} if isinstance(change, Mapping) else change)
    return Plan.from_dict({**values, "guards": {name: asdict(guard) for name, guard in guards.items()}})


def kl_guard_nats(precision: str, expected: Expected | None = None) -> float:
    """The mean KL, in nats per token, up to which a variant is within the guard that `plan_for` gives it."""
    guard = _quality_guards(expected or Expected(), _TYPICAL[_family(precision)])["kl_divergence"]
    return guard.expected + guard.margin


def _quality_guards(given: Expected, typical: Expected) -> dict[str, Guard]:
    """Half as much again as expected, and never less than what live sampling cannot tell apart.

    Perplexity and flips are watched live only by those who measure them: their guard comes with their evaluation.
    """
    kl = typical.kl_divergence if given.kl_divergence is None else given.kl_divergence
    top1 = typical.top1_agreement if given.top1_agreement is None else given.top1_agreement
    guards = {
        "kl_divergence": Guard(margin=0.5 * (kl or 0.0) + 0.002, expected=kl or 0.0, weight=0.06),
        "top1_agreement": Guard(margin=0.25 * (1.0 - (top1 or 0.0)) + 0.02, expected=top1 or 0.0, weight=0.04),
    }
    if (ratio := given.perplexity_ratio) is not None:
        guards["perplexity_ratio"] = Guard(margin=0.5 * abs(ratio - 1.0) + 0.01, expected=ratio - 1.0, weight=0.03)
    if given.flips is not None:
        guards["flips"] = Guard(margin=0.25 * given.flips + 0.05, expected=given.flips, weight=0.02)
    return guards


def _family(precision: str) -> str:
    name = precision.lower()
    for family, words in {
        "16-bit": ("bf16", "fp16", "fp32"),
        "int8": ("int8", "gptq8"),
        "fp8": ("fp8",),
        "4-bit": ("nf4", "gptq4", "awq4", "rtn4", "int4"),
    }.items():
        if any(name.endswith(word) or name.startswith(f"{word}-") or name == word for word in words):
            return family
    return "other"


def _step(index: int, value: object) -> Step:
    path = f"rollout.steps[{index}]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Step(float(value))
    return Step(**check_keys(path, value, Step))


def _guard(name: str, value: object) -> Guard:
    if name not in MEASURES:
        raise ConfigError(f"rollout.guards.{name}", f"unknown guard; allowed: {', '.join(MEASURES)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Guard(margin=float(value))
    return Guard(**check_keys(f"rollout.guards.{name}", value, Guard))


def _list(key: str, value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"rollout.{key}", f"must be a list, got {value!r}")
    return list(value)


def _items(key: str, value: object) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"rollout.{key}", f"must be a mapping, got {value!r}")
    return [(str(name), item) for name, item in value.items()]


_POSITIVE: Final = (1e-9, 1e12)
_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "alpha": (1e-9, 0.5),
    "power": (0.5, 0.9999),
    "patience_s": _POSITIVE,
    "time_limit_s": _POSITIVE,
    "deadline_s": _POSITIVE,
    "settle_s": (0, 1e12),
    "block_s": (0.1, 1e6),
    "keep_canary_s": (0, 1e12),
}


def _check(plan: Plan) -> None:
    if plan.stable == plan.canary:
        raise ConfigError("rollout.canary", f"{plan.canary!r} is already the stable variant")
    for key, (low, high) in _RANGES.items():
        number(f"rollout.{key}", getattr(plan, key), low, high)
    if plan.on_inconclusive not in ("hold", "rollback"):
        raise ConfigError("rollout.on_inconclusive", f"must be hold or rollback, got {plan.on_inconclusive!r}")
    _check_steps(plan)
    for key in (item.name for item in fields(Hard)):
        number(f"rollout.hard.{key}", getattr(plan.hard, key), 1, 1e12)
    for name, guard in plan.guards.items():
        _check_guard(name, guard)
    if not plan.guards:
        raise ConfigError("rollout.guards", "is empty: nothing would be judged")


def _check_steps(plan: Plan) -> None:
    if not plan.steps:
        raise ConfigError("rollout.steps", "is empty: give at least one weight")
    before = 0.0
    for index, step in enumerate(plan.steps):
        path = f"rollout.steps[{index}]"
        number(f"{path}.weight", step.weight, 1e-3, 99.0)  # the stable arm must go on or nothing can be compared
        if step.weight <= before:
            raise ConfigError(f"{path}.weight", f"must rise from step to step, got {step.weight:g} after {before:g}")
        before = step.weight
        _check_wait(path, step)
        if step.gate not in ("none", "approval"):
            raise ConfigError(f"{path}.gate", f"must be none or approval, got {step.gate!r}")
        if step.evidence not in ("no_harm", "pass"):
            raise ConfigError(f"{path}.evidence", f"must be no_harm or pass, got {step.evidence!r}")
    if plan.shadow:
        number("rollout.shadow.rate", plan.shadow.rate, 1e-6, 1)
        _check_wait("rollout.shadow", plan.shadow)


def _check_wait(path: str, step: Step | Shadow) -> None:
    number(f"{path}.min_samples", step.min_samples, 1, 1e12)
    number(f"{path}.hold_s", step.hold_s, 0, 1e12)


def _check_guard(name: str, guard: Guard) -> None:
    path = f"rollout.guards.{name}"
    if name not in MEASURES:
        raise ConfigError(path, f"unknown guard; allowed: {', '.join(MEASURES)}")
    level = MEASURES[name].kind == "level"
    number(f"{path}.margin", guard.margin, 1e-9, 1e9)
    number(f"{path}.weight", guard.weight, 1e-9, 1e9)
    number(f"{path}.expected", guard.expected, -1.0 if level else 0.0, 1e9 if level else 0.0)
    if guard.tolerance is not None:
        if level or MEASURES[name].kind == "rate":
            raise ConfigError(f"{path}.tolerance", "is only for latencies and lengths; here the limit is the margin")
        number(f"{path}.tolerance", guard.tolerance, 0, guard.margin)
    if guard.cap is not None:
        if not level:
            raise ConfigError(f"{path}.cap", "is only for quality guards; use margin")
        number(f"{path}.cap", guard.cap, 1e-9, 1e9)
