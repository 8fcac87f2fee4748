"""How far a variant's next-token distributions are from the reference's: what llama.cpp's `--kl-divergence` reports.

For every position: KL(reference || variant) in nats over the whole vocabulary, both losses on the true token, whether
the likeliest token agrees, and how the true token's probability moved. Losses are paired, so the perplexity ratio's
uncertainty uses their covariance: two models that stumble over the same words differ far more surely than their
separate error bars suggest. Intervals are bootstrapped over records, because the tokens of one text are not
independent. Positions where either model gives NaN or infinity are counted apart, never averaged away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from serve.quality.accuracy import Accuracy
from serve.quality.logits import LogitSource
from serve.quality.perplexity import Perplexity, standard_error

__all__ = ["Divergence", "Percentiles", "TokenScores", "compare", "score_rows"]

_BOOTSTRAP_DRAWS = 1000
_NUMBERS_AT_ONCE = 2**19
"""Logits of either side that are compared at once. What is made of them fits a cache: with 2**20 it took twice as
long, and took the memory's bandwidth from neighbours."""


@dataclass(frozen=True)
class TokenScores:
    """Everything known about each scored position, all `[tokens]`; `record` says which text it belongs to."""

    kl_divergence: Tensor  # float64, nats
    nll_reference: Tensor  # float64, nats
    nll_variant: Tensor
    same_top: Tensor  # bool
    right_reference: Tensor  # bool
    right_variant: Tensor
    record: Tensor  # int64

    @classmethod
    def join(cls, parts: Sequence[TokenScores]) -> TokenScores:
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def select(self, mask: Tensor) -> TokenScores:
        return TokenScores(**{f.name: getattr(self, f.name)[mask] for f in fields(self)})

    @property
    def finite(self) -> Tensor:
        return (
            torch.isfinite(self.kl_divergence) & torch.isfinite(self.nll_reference) & torch.isfinite(self.nll_variant)
        )


def score_rows(reference: Tensor, variant: Tensor, targets: Tensor, record: int = 0) -> TokenScores:
    """Compare logits `[n, vocabulary]` with logits `[n, vocabulary]`, given the tokens that followed `[n]`."""
    at_once = max(1, _NUMBERS_AT_ONCE // reference.shape[1])
    rows = (torch.split(values, at_once) for values in (reference, variant, targets))
    parts = [_score(p, q, following, record) for p, q, following in zip(*rows, strict=True)]
    return TokenScores.join(parts)


def _score(reference: Tensor, variant: Tensor, targets: Tensor, record: int) -> TokenScores:
    p = reference.float().cpu().log_softmax(-1)
    q = variant.float().cpu().log_softmax(-1)
    targets = targets.cpu()
    # Where the reference gives no chance at all, 0 * inf is nothing, not NaN.
    difference = torch.where(p == -torch.inf, torch.zeros_like(p), p - q)
    kl = (p.exp().double() * difference.double()).sum(-1)
    top_p, top_q = p.argmax(-1), q.argmax(-1)
    return TokenScores(
        kl_divergence=kl,
        nll_reference=-p.gather(1, targets[:, None])[:, 0].double(),
        nll_variant=-q.gather(1, targets[:, None])[:, 0].double(),
        same_top=top_p == top_q,
        right_reference=top_p == targets,
        right_variant=top_q == targets,
        record=torch.full(targets.shape, record),
    )


@dataclass(frozen=True)
class Percentiles:
    """A distribution over tokens; `mean` ± `standard_error` as over independent tokens."""

    mean: float
    standard_error: float
    max: float
    p99_9: float
    p99: float
    p95: float
    p90: float
    median: float
    p10: float
    p5: float
    p1: float
    p0_1: float
    min: float

    @classmethod
    def of(cls, values: Tensor) -> Percentiles:
        if not values.numel():
            return cls(*[float("nan")] * len(fields(cls)))
        points = torch.tensor([1, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001, 0], dtype=torch.float64)
        ordered = values.sort().values
        places = points * (values.numel() - 1)
        low, high = ordered[places.floor().long()], ordered[places.ceil().long()]
        quantiles = low + (high - low) * (places - places.floor())
        return cls(values.mean().item(), standard_error(values), *quantiles.tolist())


@dataclass(frozen=True)
class Divergence:
    """A variant against its reference over one text. Intervals are 95 %, bootstrapped over records."""

    tokens: int
    non_finite_tokens: int
    records: int
    perplexity_reference: Perplexity
    perplexity_variant: Perplexity
    ln_perplexity_correlation: float
    mean_ln_ratio: float
    mean_ln_ratio_standard_error: float
    perplexity_ratio: float
    perplexity_ratio_standard_error: float
    perplexity_ratio_interval: tuple[float, float]
    perplexity_difference: float
    perplexity_difference_standard_error: float
    kl_divergence: Percentiles
    kl_divergence_interval: tuple[float, float]
    delta_p: Percentiles
    rms_delta_p: float
    rms_delta_p_standard_error: float
    top1_agreement: float
    top1_agreement_standard_error: float
    top1_agreement_interval: tuple[float, float]
    accuracy: Accuracy

    @classmethod
    def of(cls, scores: TokenScores) -> Divergence:
        """Sum up per-token scores; positions that are not finite count in `non_finite_tokens` alone."""
        kept = scores.select(scores.finite)
        p, q = Perplexity.of(kept.nll_reference), Perplexity.of(kept.nll_variant)
        delta = (-kept.nll_variant).exp() - (-kept.nll_reference).exp()
        count = kept.kl_divergence.numel()
        agreement = kept.same_top.double().mean().item() if count else float("nan")
        rms = delta.square().mean().sqrt().item() if count else float("nan")
        paired = _Paired.of(kept.nll_reference, kept.nll_variant)
        ratio = q.value / p.value
        return cls(
            tokens=count,
            non_finite_tokens=scores.kl_divergence.numel() - count,
            records=torch.unique(kept.record).numel(),
            perplexity_reference=p,
            perplexity_variant=q,
            ln_perplexity_correlation=paired.correlation,
            mean_ln_ratio=q.mean_nll_nats - p.mean_nll_nats,
            mean_ln_ratio_standard_error=paired.error_of_difference(1.0, 1.0),
            perplexity_ratio=ratio,
            perplexity_ratio_standard_error=ratio * paired.error_of_difference(1.0, 1.0),
            perplexity_ratio_interval=_interval((kept.nll_variant - kept.nll_reference), kept.record, exponential=True),
            perplexity_difference=q.value - p.value,
            perplexity_difference_standard_error=paired.error_of_difference(p.value, q.value),
            kl_divergence=Percentiles.of(kept.kl_divergence),
            kl_divergence_interval=_interval(kept.kl_divergence, kept.record),
            delta_p=Percentiles.of(delta),
            rms_delta_p=rms,
            rms_delta_p_standard_error=0.5 / rms * standard_error(delta.square()) if rms else 0.0,
            top1_agreement=agreement,
            top1_agreement_standard_error=standard_error(kept.same_top.double()),
            top1_agreement_interval=_interval(kept.same_top.double(), kept.record),
            accuracy=Accuracy.of(kept.right_reference, kept.right_variant),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(reference: LogitSource, variant: LogitSource, records: Iterable[Sequence[int]]) -> Divergence:
    """Score both sources on the same records, one at a time; the first token of a record is given, not scored."""
    parts = []
    for index, ids in enumerate(records):
        if (known := len(ids) - 1) > 0:
            parts.append(score_rows(reference(ids)[:known], variant(ids)[:known], torch.tensor(list(ids[1:])), index))
    if not parts:
        raise ValueError("no record has two tokens: nothing to score")
    return Divergence.of(TokenScores.join(parts))


@dataclass(frozen=True)
class _Paired:
    """Standard errors of two means over the same tokens, and the covariance of those means."""

    reference: float
    variant: float
    covariance: float

    @classmethod
    def of(cls, reference: Tensor, variant: Tensor) -> _Paired:
        count = max(reference.numel() - 1, 1)
        covariance = ((reference - reference.mean()) * (variant - variant.mean())).mean().item() / count
        return cls(standard_error(reference), standard_error(variant), covariance)

    @property
    def correlation(self) -> float:
        scale = self.reference * self.variant
        return self.covariance / scale if scale else 1.0

    def error_of_difference(self, a: float, b: float) -> float:
        """The standard error of b * variant - a * reference."""
        variance = (a * self.reference) ** 2 + (b * self.variant) ** 2 - 2 * a * b * self.covariance
        return math.sqrt(max(variance, 0.0))


def _interval(values: Tensor, record: Tensor, *, exponential: bool = False) -> tuple[float, float]:
    """The 95 % interval of the mean, drawing whole records with replacement; the same draws every time."""
    index = torch.unique(record, return_inverse=True)[1]
    count = int(index.max()) + 1 if index.numel() else 0
    if not count:
        return float("nan"), float("nan")
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, values)
    sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, index, torch.ones_like(values))
    draws = torch.randint(count, (_BOOTSTRAP_DRAWS, count), generator=torch.Generator().manual_seed(0))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    low, high = torch.quantile(means.exp() if exponential else means, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return low.item(), high.item()
