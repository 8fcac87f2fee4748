"""Next-token accuracy and flips: how often the likeliest token is the true one, and how often that changed.

Two models of equal accuracy may still answer differently: a *flip* is a position that one gets right and the other
wrong (Dutta et al., arXiv 2407.09141). Flips gate better than accuracy does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

__all__ = ["Accuracy"]


@dataclass(frozen=True)
class Accuracy:
    """Shares of scored tokens; `kept_ratio` is the variant's accuracy over the reference's."""

    reference: float
    variant: float
    kept_ratio: float
    flips: float
    lost: float  # right before, wrong now
    gained: float  # wrong before, right now

    @classmethod
    def of(cls, reference_right: Tensor, variant_right: Tensor) -> Accuracy:
        """From which positions each got right, bool `[tokens]`."""
        count = max(reference_right.numel(), 1)
        before, after = reference_right.sum().item() / count, variant_right.sum().item() / count
        lost = (reference_right & ~variant_right).sum().item() / count
        gained = (~reference_right & variant_right).sum().item() / count
        return cls(before, after, after / before if before else float("nan"), lost + gained, lost, gained)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
