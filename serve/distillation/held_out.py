"""How far a student is from its teacher, on text that neither choosing nor learning has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve.compression.compress import Progress, silent
from serve.quality import compare, model_logits

__all__ = ["Distance", "measure"]


@dataclass(frozen=True)
class Distance:
    """Nats per token, and next-token accuracy, over `tokens` scored tokens; the interval is bootstrapped, 95 %."""

    kl_divergence: float
    kl_divergence_interval: tuple[float, float]
    perplexity: float
    perplexity_ratio: float
    top1_agreement: float
    accuracy: float
    accuracy_kept_ratio: float
    flips: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def noted(self) -> dict[str, Any]:
        """As an artifact's manifest has it; the teacher is in fp32."""
        left_out = ("kl_divergence_interval", "perplexity", "accuracy_kept_ratio")
        return {"reference": "fp32", **{key: value for key, value in self.to_dict().items() if key not in left_out}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Distance:
        low, high = data["kl_divergence_interval"]
        return cls(**{**data, "kl_divergence_interval": (low, high)})


def measure(teacher: Any, student: Any, records: Sequence[Sequence[int]], progress: Progress = silent) -> Distance:
    """Score both on every record, token by token."""
    found = compare(model_logits(teacher), model_logits(student), _told(records, progress))
    return Distance(
        kl_divergence=found.kl_divergence.mean,
        kl_divergence_interval=found.kl_divergence_interval,
        perplexity=found.perplexity_variant.value,
        perplexity_ratio=found.perplexity_ratio,
        top1_agreement=found.top1_agreement,
        accuracy=found.accuracy.variant,
        accuracy_kept_ratio=found.accuracy.kept_ratio,
        flips=found.accuracy.flips,
        tokens=found.tokens,
    )


def _told(records: Sequence[Sequence[int]], progress: Callable[[str, int, int], None]) -> Any:
    for done, ids in enumerate(records):
        progress("measure", done, len(records))
        yield ids
