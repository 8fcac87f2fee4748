"""Which candidate is recommended, and why each other one is not. Pure: it sees measured numbers only.

First what cannot be: too large for the memory, or below the floor. Of the rest a server wants the fastest, a small
device the smallest; among those that are within a few percent of the best, the one closest to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve.advice.target import Target

__all__ = ["Candidate", "Verdict", "judge"]

_TIE_RATIO = 1.05


@dataclass(frozen=True)
class Candidate:
    """One recipe on one source, measured. `needed_bytes`: model, keys and values, and on a server the process."""

    recipe: str
    source: str
    bytes: int
    needed_bytes: int
    kl_divergence: float
    accuracy_kept_ratio: float
    flips: float
    tokens_per_s: float | None
    efficiency: float | None

    @property
    def name(self) -> str:
        return self.recipe


@dataclass(frozen=True)
class Verdict:
    """`candidate` is None where nothing was measured: ruled out by its size beforehand, or failed."""

    recipe: str
    source: str
    verdict: str  # recommended | suitable | ruled out
    reason: str
    candidate: Candidate | None

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self.candidate) if self.candidate is not None else {}
        return {"recipe": self.recipe, "source": self.source, "verdict": self.verdict, "reason": self.reason, **found}


def judge(candidates: Sequence[Candidate], target: Target) -> list[Verdict]:
    """A verdict for each, the recommended first, then the suitable from best to worst, then the others."""
    refused = {id(one): reason for one in candidates if (reason := _refusal(one, target)) is not None}
    left = [one for one in candidates if id(one) not in refused]
    out = [_verdict(one, "ruled out", refused[id(one)]) for one in candidates if id(one) in refused]
    if not left:
        return out
    by_speed = target.traits.wants == "speed" and all(one.tokens_per_s for one in left)
    cost = {id(one): 1 / (one.tokens_per_s or 1) if by_speed else float(one.bytes) for one in left}
    least = min(cost.values())
    best = min((one for one in left if cost[id(one)] <= _TIE_RATIO * least), key=lambda one: one.kl_divergence)
    others = sorted((one for one in left if one is not best), key=lambda one: cost[id(one)])
    return [
        _verdict(best, "recommended", _praise(best, left, cost, by_speed=by_speed)),
        *(_verdict(one, "suitable", _less(one, best, by_speed=by_speed)) for one in others),
        *out,
    ]


def _refusal(one: Candidate, target: Target) -> str | None:
    if one.needed_bytes > target.memory_bytes:
        return f"needs {_size(one.needed_bytes)} of memory, and there are {_size(target.memory_bytes)}"
    if not one.accuracy_kept_ratio >= target.floor_ratio:
        return f"keeps {one.accuracy_kept_ratio:.1%} of the accuracy, and the floor is {target.floor_ratio:.1%}"
    if target.max_kl is not None and not one.kl_divergence <= target.max_kl:
        return f"its KL of {one.kl_divergence:.4f} nats is above the {target.max_kl:g} allowed"
    return None


def _praise(best: Candidate, left: Sequence[Candidate], cost: dict[int, float], *, by_speed: bool) -> str:
    what = "fastest" if by_speed else "smallest"
    rivals = [one for one in left if one is not best and cost[id(one)] <= _TIE_RATIO * cost[id(best)]]
    if len(left) == 1:
        return "the only one that fits and keeps the floor"
    if any(cost[id(one)] < cost[id(best)] for one in rivals):
        return f"among the {what} (within {_TIE_RATIO - 1:.0%}) the closest to the reference"
    return f"the {what} that fits and keeps the floor"


def _less(one: Candidate, best: Candidate, *, by_speed: bool) -> str:
    closer = one.kl_divergence < best.kl_divergence
    if by_speed and one.tokens_per_s and best.tokens_per_s:
        ratio = one.tokens_per_s / best.tokens_per_s
        pace = f"{ratio:.2f} of {best.name}'s speed"
    else:
        pace = f"{one.bytes / best.bytes:.2f} of {best.name}'s size"
    return f"{pace}, {'though closer to' if closer else 'and no closer to'} the reference"


def _verdict(one: Candidate, verdict: str, reason: str) -> Verdict:
    return Verdict(one.recipe, one.source, verdict, reason, one)


def _size(count_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.3g} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.3g} TB"
