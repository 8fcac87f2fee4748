"""Magnitude pruning (LeCun et al., 1989; Han et al., arXiv 1506.02626): the smallest weights go.

The oldest rule and the baseline. It looks at weights alone, so a small weight on a loud input goes and a large one on
a silent input stays: at 50 % a language model is ruined by it. `keep_largest` is what all pruners here share: it turns
any score into a mask, free (`unstructured`) or two in every four neighbours (`2:4`, which GPUs multiply at twice the
speed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from serve.compression.methods.rtn import check_weight

__all__ = ["Pattern", "keep_largest", "magnitude_mask"]

Pattern = Literal["", "2:4"]
_PART = 1 << 18  # scores compared at a time, unless a row is longer


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
    down. Among equal scores the first stays. Scores are float32 and not negative.
    """
    if not pattern:
        count = score.shape[1] - round(score.shape[1] * sparsity)
        return _in_parts(score, lambda part: _above_threshold(part, count))
    whole = score.shape[1] // 4 * 4
    fours = _in_parts(score[:, :whole].reshape(-1, 4), lambda part: _largest(part, 2)).view(score.shape[0], whole)
    rest = score[:, whole:]
    return torch.cat([fours, _largest(rest, -(-rest.shape[1] // 2))], dim=1)


def _in_parts(score: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Some rows at a time, for choosing takes several times the memory of what is chosen from."""
    kept = torch.empty_like(score, dtype=torch.bool)
    step = max(1, _PART // max(1, score.shape[1]))
    for start in range(0, score.shape[0], step):
        kept[start : start + step] = choose(score[start : start + step])
    return kept


def _largest(score: Tensor, count: int) -> Tensor:
    best = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)


def _above_threshold(score: Tensor, count: int) -> Tensor:
    """The same without sorting, which takes more memory than long rows can spare: the threshold is found bit by bit,
    for numbers that are not negative are ordered as their bits are.
    """
    parts = torch.split(score.float().contiguous().view(torch.int32), _PART, dim=1)
    threshold = torch.zeros(score.shape[0], 1, dtype=torch.int32, device=score.device)
    for bit in range(30, -1, -1):  # the largest threshold that still leaves `count` at or above it
        higher = threshold | 1 << bit
        threshold = torch.where(_count(part >= higher for part in parts) >= count, higher, threshold)
    left = count - _count(part > threshold for part in parts)
    kept = []
    for part in parts:
        equal = part == threshold  # of these the first
        kept.append((part > threshold) | equal & (equal.cumsum(1) <= left))
        left = left - _count([equal])
    return torch.cat(kept, dim=1)


def _count(masks: Iterable[Tensor]) -> Tensor:
    """How many are set in each row, `[rows, 1]`; summing turns each mask to int64 first."""
    return torch.stack([mask.sum(1, keepdim=True) for mask in masks]).sum(0)
