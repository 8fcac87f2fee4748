"""Who gets which variant: one immutable table, and two pure functions that read it.

**The layout.** A user (or, without a sticky key, a request) is hashed to a point on [0, 100). Every variant owns one
interval whose length is its weight. The stable variant is the reservoir in the middle; the first other variant, in the
order of `weights`, grows from the left end, and all further ones are stacked inwards from the right end:

    0        10                              80      90       100
    |  int8  |            bf16 (stable)      |  awq4  |  nf4  |      weights = bf16 70, int8 10, nf4 10, awq4 10

So a weight that is raised at the cost of the stable one moves points from stable into that variant and nowhere else:
whoever has the canary at 10 % keeps it at 25 %, and gets stable back, nothing else, after a rollback. The one exception
is three or more variants beside stable: raising one that is stacked outside of another also pushes the inner one along.
The roles do not enter the layout, so a variant that already takes traffic keeps its users when a rollout starts on it.

The hash is BLAKE2b, keyed by the salt: the same in every process and after every restart. A new salt deals anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal

from serve.errors import ConfigError
from serve.rollout.strict import check_keys, number

__all__ = ["Assignment", "Route", "Split", "assign", "shadows", "unit_hash"]

Route = Literal["pinned", "weighted", "sticky", "canary"]

_WEIGHT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Assignment:
    """Where one request goes and why. `route` is never "pinned" here: a pin is settled before the split is asked."""

    variant: str
    route: Route
    held_out: bool = False


@dataclass(frozen=True)
class Split:
    """The traffic table in force. Knows nothing of health: an unhealthy variant is the router's business.

    weights: percent 0-100 by variant name, summing to 100, in layout order (see above); zeros are welcome.
    canary: the variant under rollout, if any; it only changes what `route` says.
    shadow: share 0-1 of requests mirrored to a variant, by name; whether it also serves users does not matter.
    holdout: percent of units that always get stable and are left out of comparisons; weights deal out the rest.
    revision: rises with every change, so that a reader keeps the newest and an outcome says what it was dealt under.
    """

    stable: str
    weights: Mapping[str, float]
    canary: str | None = None
    salt: str = ""
    holdout: float = 0.0
    shadow: Mapping[str, float] | None = None
    revision: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _numbers("traffic.weights", self.weights, 100))
        object.__setattr__(self, "shadow", _numbers("traffic.shadow", self.shadow or {}, 1))
        object.__setattr__(self, "holdout", number("traffic.holdout", self.holdout, 0, 100))
        _check(self)

    def __hash__(self) -> int:
        return hash((self.stable, self.canary, self.salt, self.revision))

    @property
    def shadow_rates(self) -> Mapping[str, float]:
        return self.shadow or {}

    def moved(self, weights: Mapping[str, float], *, canary: str | None = None) -> Split:
        """The next revision with other weights; variants keep their place in the layout, new ones go last."""
        order = [*self.weights, *(name for name in weights if name not in self.weights)]
        dealt = {name: weights.get(name, 0.0) for name in order}
        return replace(self, weights=dealt, canary=canary, revision=self.revision + 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "stable": self.stable,
            "weights": dict(self.weights),
            "canary": self.canary,
            "salt": self.salt,
            "holdout": self.holdout,
            "shadow": dict(self.shadow_rates),
            "revision": self.revision,
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Split:
        return cls(**check_keys("traffic", mapping, cls))


def assign(split: Split, sticky_key: str | None, request_id: str) -> Assignment:
    """The variant of one request: by its user's point where there is a sticky key, else by its own."""
    unit = request_id if sticky_key is None else sticky_key
    if split.holdout and _point(split.salt, "holdout", unit) < split.holdout:
        return Assignment(split.stable, _route(split, split.stable, sticky_key), held_out=True)
    point = _point(split.salt, "assign", unit)
    variant = next((name for name, low, high in _intervals(split) if low <= point < high), split.stable)
    return Assignment(variant, _route(split, variant, sticky_key))


def shadows(split: Split, request_id: str) -> tuple[str, ...]:
    """The variants that this request is mirrored to, each drawn on its own."""
    return tuple(
        name
        for name, rate in split.shadow_rates.items()
        if _point(split.salt, f"shadow {name}", request_id) < 100.0 * rate
    )


def unit_hash(salt: str, sticky_key: str) -> str:
    """What outcomes carry instead of the user's name: 16 hex digits, not to be traced back without the salt."""
    return _digest(salt, "unit", sticky_key).hex()


def _intervals(split: Split) -> Iterator[tuple[str, float, float]]:
    """[low, high) of every variant but stable, which owns what is left between them."""
    others = [(name, weight) for name, weight in split.weights.items() if name != split.stable]
    for name, weight in others[:1]:
        yield name, 0.0, weight
    high = 100.0
    for name, weight in others[1:]:
        yield name, high - weight, high
        high -= weight


def _route(split: Split, variant: str, sticky_key: str | None) -> Route:
    if variant == split.canary:
        return "canary"
    return "weighted" if sticky_key is None else "sticky"


def _point(salt: str, purpose: str, unit: str) -> float:
    """A uniform point on [0, 100); independent between purposes."""
    return (int.from_bytes(_digest(salt, purpose, unit)) >> 11) * 2.0**-53 * 100.0


def _digest(salt: str, purpose: str, unit: str) -> bytes:
    framed = f"{len(salt)} {len(purpose)} {salt}{purpose}{unit}"
    return blake2b(framed.encode("utf-8", "surrogatepass"), digest_size=8, person=b"halftone").digest()


def _check(split: Split) -> None:
    if abs((total := math.fsum(split.weights.values())) - 100.0) > _WEIGHT_TOLERANCE:
        raise ConfigError("traffic.weights", f"must sum to 100, got {total:g}")
    for key, name in (("stable", split.stable), ("canary", split.canary)):
        if name is not None and name not in split.weights:
            raise ConfigError(
                f"traffic.{key}", f"{name!r} has no entry in traffic.weights ({', '.join(split.weights)})"
            )
    if split.canary == split.stable:
        raise ConfigError("traffic.canary", f"{split.canary!r} is already the stable variant")


def _numbers(path: str, values: object, high: float) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise ConfigError(path, f"must map variant names to numbers, got {values!r}")
    return {str(name): number(f"{path}.{name}", value, 0, high) for name, value in values.items()}
