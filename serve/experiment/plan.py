"""What was asked for: who gets which variant, for how long, and how it will be looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from serve.errors import ConfigError
from serve.rollout.split import Split
from serve.rollout.strict import check_keys, number

__all__ = ["Plan", "plan_for"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_S: Final = 366 * 86400.0


@dataclass(frozen=True)
class Plan:
    """One experiment, every default filled in. Times are Unix seconds.

    weights: percent by variant, summing to 100; those above zero are its arms. holdout: percent of the users who stay
        on the stable variant and are left out.
    baseline: the arm that the others are compared with.
    price_per_hour: of the machine of one replica, in whatever currency.
    settle_s: latency is not looked at so soon after the start, while queues and batches find their new size.
    block_s: requests closer in time than this may depend on one another; doubled as the experiment grows longer.
    deadline_s: a request that is open for longer has failed.
    """

    name: str
    weights: Mapping[str, float]
    baseline: str
    salt: str
    starts_at_s: float
    ends_at_s: float | None = None
    holdout: float = 0.0
    price_per_hour: float | None = None
    settle_s: float = 30.0
    block_s: float = 30.0
    deadline_s: float = 120.0

    @property
    def arms(self) -> tuple[str, ...]:
        """The baseline first."""
        others = [name for name, weight in self.weights.items() if weight > 0.0 and name != self.baseline]
        return (self.baseline, *others)

    def split(self, base: Split) -> Split:
        """The traffic table while it runs: the next revision of `base`, which keeps its mirrors."""
        moved = base.moved(self.weights)
        return replace(moved, salt=self.salt, holdout=self.holdout)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "weights": dict(self.weights)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Plan:
        return cls(**check_keys("experiment", mapping, cls))


def plan_for(asked: Mapping[str, Any], stable: str, variants: Sequence[str], now_s: float) -> Plan:
    """Fill in what was left out. `asked` has the keys of `Plan`, or `duration_s` instead of `ends_at_s`; null asks for
    nothing. Raises ConfigError by the key."""
    given = {key: value for key, value in asked.items() if value is not None}
    starts_at_s = number("starts_at_s", given.pop("starts_at_s", now_s), 0, 1e12)
    given = {"salt": given.get("name", ""), **_end(given, starts_at_s), "starts_at_s": starts_at_s}
    if isinstance(weights := given.get("weights"), Mapping):
        given.setdefault("baseline", stable if weights.get(stable) else max(weights, key=_weight(weights), default=""))
    for key in given:
        if key not in Plan.__dataclass_fields__:
            raise ConfigError(key, f"unknown key; allowed: {', '.join(Plan.__dataclass_fields__)}, duration_s")
    plan = Plan.from_dict(given)
    _check(plan, variants)
    if plan.ends_at_s is not None and plan.ends_at_s <= max(now_s, plan.starts_at_s):
        raise ConfigError("ends_at_s", "lies before the start; give a later time, or duration_s")
    return plan


def _end(given: dict[str, Any], starts_at_s: float) -> dict[str, Any]:
    if "duration_s" not in given:
        return given
    duration_s = number("duration_s", given.pop("duration_s"), 1.0, _LONGEST_S)
    if "ends_at_s" in given:
        raise ConfigError("duration_s", "says the same as ends_at_s; give one of them")
    return {**given, "ends_at_s": starts_at_s + duration_s}


def _weight(weights: Mapping[str, Any]) -> Any:
    return lambda name: weights[name] if isinstance(weights[name], int | float) else 0.0


def _check(plan: Plan, variants: Sequence[str]) -> None:
    if not isinstance(plan.name, str) or not _NAME.fullmatch(plan.name):
        raise ConfigError("name", f"must be up to 64 letters, digits, dots, dashes and underscores, got {plan.name!r}")
    if not isinstance(plan.salt, str) or len(plan.salt) > 256:
        raise ConfigError("salt", "must be a text of at most 256 characters")
    for name, weight in plan.weights.items():
        if name not in variants:
            raise ConfigError(f"weights.{name}", f"unknown variant; allowed: {', '.join(variants)}")
        number(f"weights.{name}", weight, 0, 100)
    if abs((total := sum(plan.weights.values())) - 100.0) > 1e-6:
        raise ConfigError("weights", f"must sum to 100, got {total:g}")
    if sum(weight > 0.0 for weight in plan.weights.values()) < 2:
        raise ConfigError("weights", "must give at least two variants a weight above 0, or nothing can be compared")
    if not plan.weights.get(plan.baseline):
        raise ConfigError("baseline", f"{plan.baseline!r} has no weight in this experiment")
    for key, low, high in _RANGES:
        if (value := getattr(plan, key)) is not None:
            number(key, value, low, high)


_RANGES: Final = (
    ("holdout", 0.0, 99.0),
    ("price_per_hour", 0.0, 1e9),
    ("settle_s", 0.0, 86400.0),
    ("block_s", 0.1, 86400.0),
    ("deadline_s", 1.0, 86400.0),
    ("ends_at_s", 0.0, 1e12),
)
