"""Perplexity: the exponential of the mean negative log-likelihood per token, with its standard error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from serve.quality.logits import LogitSource

__all__ = ["Perplexity", "perplexity", "standard_error"]

ROWS_AT_ONCE = 64
"""Positions whose whole vocabulary is in float32 at the same time; bounds the memory."""


@dataclass(frozen=True)
class Perplexity:
    """`value` ± `standard_error` over `tokens` scored tokens; tokens whose loss is NaN or infinite are left out."""

    value: float
    standard_error: float
    mean_nll_nats: float
    tokens: int
    non_finite_tokens: int

    @classmethod
    def of(cls, nll: Tensor) -> Perplexity:
        """From per-token losses in nats, float64 `[tokens]`."""
        finite = nll[torch.isfinite(nll)]
        mean = finite.mean().item() if finite.numel() else float("nan")
        value = float(torch.tensor(mean, dtype=torch.float64).exp())
        return cls(value, value * standard_error(finite), mean, finite.numel(), nll.numel() - finite.numel())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(source: LogitSource, records: Iterable[Sequence[int]]) -> Perplexity:
    """Score every token of every record but the first of each."""
    losses = [_nll(source(ids)[: len(ids) - 1], torch.tensor(list(ids[1:]))) for ids in records if len(ids) > 1]
    return Perplexity.of(torch.cat(losses) if losses else torch.empty(0, dtype=torch.float64))


def standard_error(values: Tensor) -> float:
    """Of the mean, taking tokens as independent (as llama.cpp does)."""
    return (values.var(unbiased=False) / max(values.numel() - 1, 1)).sqrt().item() if values.numel() > 1 else 0.0


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses in nats, float64 `[n]`, from logits `[n, vocabulary]` and the tokens that followed `[n]`."""
    losses = [
        -rows.float().log_softmax(-1).gather(1, following.to(rows.device)[:, None])[:, 0].double().cpu()
        for rows, following in zip(torch.split(logits, ROWS_AT_ONCE), torch.split(targets, ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(losses)
