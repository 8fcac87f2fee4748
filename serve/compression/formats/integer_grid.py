"""Weights on an integer grid, unpacked: what a rounding method returns, and what the grouped format packs.

    weight[n, k] = (code[n, k] - zero_point[group(k), n]) * scale[group(k), n]

A group is `group_size` neighbouring columns of one row. A symmetric grid has its zero point fixed at the middle code,
2**(bits - 1), and stores none. GPTQ with activation order may group columns that are not neighbours: they are brought
together once, and `permutation` says which input feature each stored column multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GroupedWeight", "IntegerGrid"]


@dataclass(frozen=True)
class IntegerGrid:
    """The values a code may stand for. `group_size` -1 is one group per row, whatever its length."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, not {self.bits}")
        if self.group_size < 1 and self.group_size != -1:
            raise ValueError(f"group_size must be positive, or -1 for one group per row, not {self.group_size}")

    @property
    def levels(self) -> int:
        return int(2**self.bits)

    @property
    def middle(self) -> int:
        """The code of zero on a symmetric grid."""
        return self.levels // 2

    def columns_per_group(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Number of groups of a row; the last may be short."""
        return -(-in_features // self.columns_per_group(in_features))

    def group_index(self, in_features: int) -> Tensor:
        """Group of each stored column, int64 `[in_features]`."""
        return torch.arange(in_features) // self.columns_per_group(in_features)


@dataclass(frozen=True)
class GroupedWeight:
    """One matrix on an `IntegerGrid`, unpacked: what a method returns and `GroupedLinear` stores.

    codes: uint8 `[out_features, in_features]` in stored column order · scales: float `[groups, out_features]`, of the
    type they will be stored in · zero_points: uint8 `[groups, out_features]`, None when symmetric · permutation: int64
    `[in_features]`, input feature of each stored column, None for the natural order.
    """

    grid: IntegerGrid
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    permutation: Tensor | None = None

    @classmethod
    def stack(cls, parts: Sequence[GroupedWeight]) -> GroupedWeight:
        """Matrices of one grid and one order of columns, one below another."""
        if len(parts) == 1:
            return parts[0]
        first, zeros = parts[0], [part.zero_points for part in parts if part.zero_points is not None]
        return cls(
            first.grid,
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts], dim=1),
            torch.cat(zeros, dim=1) if zeros else None,
            first.permutation,
        )

    def split(self, rows: Sequence[int]) -> list[GroupedWeight]:
        """Matrices of so many rows each, one after another: siblings that were rounded together."""
        codes, scales = torch.split(self.codes, list(rows)), torch.split(self.scales, list(rows), dim=1)
        zeros: list[Tensor | None] = [None] * len(rows)
        if self.zero_points is not None:
            zeros = list(torch.split(self.zero_points, list(rows), dim=1))
        return [GroupedWeight(self.grid, *parts, self.permutation) for parts in zip(codes, scales, zeros, strict=True)]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix `[out_features, in_features]` in the model's column order. Not for serving."""
        index = self.grid.group_index(self.codes.shape[1]).to(self.codes.device)
        zero = self.grid.middle if self.zero_points is None else self.zero_points.to(dtype).t()[:, index]
        stored = (self.codes.to(dtype) - zero) * self.scales.to(dtype).t()[:, index]
        if self.permutation is None:
            return stored
        natural = torch.empty_like(stored)
        natural[:, self.permutation] = stored
        return natural
