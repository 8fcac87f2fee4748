"""Magnitude pruning (LeCun et al., 1989; Han et al., arXiv 1506.02626): the smallest weights go.

The oldest rule and the baseline. It looks at weights alone, so a small weight on a loud input goes and a large one on
a silent input stays: at 50 % a language model is ruined by it. `keep_largest` is what all pruners here share: it turns
any score into a mask, free (`unstructured`) or two in every four neighbours (`2:4`, which GPUs multiply at twice the
speed).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from serve.compression.methods.rtn import check_weight

__all__ = ["Pattern", "keep_largest", "magnitude_mask"]

Pattern = Literal["", "2:4"]


def magnitude_mask(weight: Tensor, sparsity: float, pattern: Pattern = "", name: str = "weight") -> Tensor:
    """Bool `[out_features, in_features]`, True where a weight stays; compared over the whole matrix.

    Raises `CompressionError` naming the layer if a weight is not finite.
    """
    check_weight(weight, name)
    if pattern:
        return keep_largest(weight.abs(), sparsity, pattern)
    return keep_largest(weight.abs().flatten()[None], sparsity).view_as(weight)


def keep_largest(score: Tensor, sparsity: float, pattern: Pattern = "") -> Tensor:
    """Mask of the largest scores in each row of `score [rows, columns]`: exactly `columns - round(columns * sparsity)`.

    With `pattern` 2:4 `sparsity` is not read: of every four neighbours two go, of a short last group half, rounded
    down. Among equal scores the first stays.
    """
    if not pattern:
        return _largest(score, score.shape[1] - round(score.shape[1] * sparsity))
    whole = score.shape[1] // 4 * 4
    fours = _largest(score[:, :whole].reshape(-1, 4), 2).view(score.shape[0], whole)
    rest = score[:, whole:]
    return torch.cat([fours, _largest(rest, -(-rest.shape[1] // 2))], dim=1)


def _largest(score: Tensor, count: int) -> Tensor:
    best = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)
