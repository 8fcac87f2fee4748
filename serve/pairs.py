"""What pairs of answers are made of: the vocabulary that engine-side recording and scoring share with the ingress.

A sampled request is *recorded* where it is served: what its own pass computed is kept, nothing is computed twice. The
recording goes through the object store to another variant, the *reader*, which scores the same tokens and sends back
numbers. Standard library only: an ingress hands recordings on without opening them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["SCORING_PRIORITY", "SHADOW_PRIORITY", "DriftSettings", "Kept", "Recording", "Scores", "Side"]

SHADOW_PRIORITY = 1
SCORING_PRIORITY = 2
"""`GenerationRequest.priority`: users first, then mirrored requests, then what is only scored."""

Side = Literal["variant", "reference"]
"""Which of the two the recorded pass is: normally the variant's; the reference's where the reference itself served."""


@dataclass(frozen=True)
class DriftSettings:
    """reference: the variant that all others are compared with. sample_rate: share 0-1 of requests that are scored.
    max_busy_ratio: share 0-1 of its time that an ingress has something scored, at most; None is no limit."""

    reference: str
    sample_rate: float = 0.05
    max_busy_ratio: float | None = None


@dataclass(frozen=True)
class Recording:
    """One answer as its variant saw it: row `i` belongs to position `first + i` and predicts the token after it.

    token_ids: prompt and answer. rows: a numpy array `[n, width]` of raw 16-bit words where `dtype` is bfloat16.
    head: digest of the head that turns hidden states into logits; None where the rows are logits (float32) already.
    logits_dtype: what the served logits were rounded to.
    """

    token_ids: tuple[int, ...]
    prompt_tokens: int
    first: int
    rows: Any
    dtype: str
    head: str | None
    logits_dtype: str


@dataclass(frozen=True)
class Kept:
    """A recording on its way: itself, or (between processes) a reference to it in the object store."""

    content: Any


@dataclass(frozen=True)
class Scores:
    """A pair of passes over the same tokens, token by token; the answer's tokens alone but for the likelihoods.

    kl_nats: KL(reference || variant) of each finite answer token. delta_p: the variant's probability of the served
    token minus the reference's, mean. first_divergence: the first answer token where the likeliest tokens differ.
    nll_*: over `nll_tokens` tokens where a perplexity ratio is fair: the prompt's, and the answer's if the reference
    served it. Text that a variant sampled favours that variant.
    """

    kl_nats: tuple[float, ...]
    top1_agreements: int
    nonfinite_tokens: int
    delta_p: float
    first_divergence: int | None
    nll_tokens: int
    nll_variant_nats: float
    nll_reference_nats: float

    @property
    def tokens(self) -> int:
        return len(self.kl_nats)

    def quantile(self, share: float) -> float:
        """Of the KL, at rank floor(share * n)."""
        ordered = sorted(self.kl_nats)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0

    def summary(self) -> Mapping[str, Any]:
        """The fields of `serve.rollout.Drift`."""
        return {
            "tokens": self.tokens,
            "kl_mean": sum(self.kl_nats) / self.tokens if self.tokens else 0.0,
            "kl_p50": self.quantile(0.5),
            "kl_p99": self.quantile(0.99),
            "kl_max": max(self.kl_nats, default=0.0),
            "top1_agreements": self.top1_agreements,
            "nonfinite_tokens": self.nonfinite_tokens,
            "delta_p_mean": self.delta_p,
            "first_divergence": self.first_divergence,
            "nll_variant_nats": self.nll_variant_nats,
            "nll_reference_nats": self.nll_reference_nats,
            "nll_ratio_tokens": self.nll_tokens,
        }
