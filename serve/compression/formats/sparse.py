"""Pruned weights with the zeros left out: one bit per weight says where they were, and the rest lie one after another.

    bits per weight = 1 + 16 * (share that stays)        9 at 50 %, against 16

The layout is the same whatever pattern the zeros form. Kernels: where this CPU has ours (`serve.kernels`) and
the activations are bf16, vectors of weights are spread between their zeros in registers on the way to the product, so
that decoding reads those 9 bits and not 16. Elsewhere some rows are spread at a time, slower than dense.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.compression.formats.linear import CompressedLinear, LinearSpec, Storage, tiled_product
from serve.errors import ArtifactError
from serve.kernels import PackedLinear

__all__ = ["SparseLinear"]

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
_ROWS = 64  # packed at a time: the places of what stays take eight times its memory


class SparseLinear(CompressedLinear):
    """Plain layout: `mask` uint8 `[out, ceil(in / 8)]`, lowest bit first, and `values` `[kept]` in the activations'
    dtype, row by row. How many are kept is known only when the layer is filled.
    """

    metadata: ClassVar[tuple[str, ...]] = ("mask",)
    mask: Tensor
    values: Tensor

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.declare("mask", (spec.out_features, -(-spec.in_features // 8)), torch.uint8)
        self.declare("values", (0,), spec.dtype)
        self._starts: list[int] = []  # where each row's values begin, and where the last row's end
        self._plain: Storage | None = None

    @classmethod
    def from_dense(cls, spec: LinearSpec, weight: Tensor, bias: Tensor | None = None) -> SparseLinear:
        """Keep whatever of `weight [out, in]` is not zero in `spec.dtype`."""
        layer = cls(spec)
        parts = [_pack(part.to(spec.dtype)) for part in torch.split(weight, _ROWS)]
        mask, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        layer.fill(mask=mask, values=values, bias=bias)
        return layer

    def fill(self, **tensors: Tensor | None) -> None:
        mask, values = tensors.get("mask"), tensors.get("values")
        if mask is not None and values is not None and mask.dtype == torch.uint8:
            counts = torch.cat([_spread_bits(part).sum(1) for part in torch.split(mask, _ROWS)])
            if values.shape != (int(counts.sum()),):
                raise ArtifactError(f"{self.spec.name}.values: {list(values.shape)}, but the mask keeps {counts.sum()}")
            self.declare("values", tuple(values.shape), self.spec.dtype)
            self._starts = [0, *counts.cumsum(0).tolist()]
        super().fill(**tensors)
        self._plain = super().storage()

    def storage(self) -> Storage:
        return self._plain or super().storage()

    def _prepare(self) -> None:
        if self.packable:
            self.packed = PackedLinear.sparse(self._rows, self.out_features, self.in_features, self.bias)
            self.mask, self.values = self.mask.new_empty(0), self.values.new_empty(0)

    @property
    def kernel(self) -> str:
        return "sparse packed" if self.packed is not None else "sparse rows + GEMM"

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None and x.dtype is torch.bfloat16:
            return self.multiply_packed(self.packed, x)
        y = tiled_product(x.reshape(-1, self.in_features), self.out_features, self._rows)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def reference(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        return F.linear(x.double(), self.dequantize().double(), bias).to(x.dtype)

    def dequantize(self) -> Tensor:
        return self._rows(slice(0, self.out_features)).float()

    def _rows(self, rows: slice) -> Tensor:
        """Some rows with their zeros, `[rows, in]`."""
        kept = _spread_bits(self.mask[rows])[:, : self.in_features].bool()
        dense = torch.zeros(kept.shape, dtype=self.values.dtype, device=self.values.device)
        return dense.masked_scatter_(kept, self.values[self._starts[rows.start] : self._starts[rows.stop]])


def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight [rows, in]` as the mask of what is not zero, and those values."""
    kept = weight != 0
    padded = F.pad(kept, (0, -weight.shape[1] % 8)).view(len(weight), -1, 8)
    return (padded * _BITS.to(weight.device)).sum(2, dtype=torch.uint8), weight[kept]


def _spread_bits(mask: Tensor) -> Tensor:
    """uint8 `[rows, bytes]` to a byte of 0 or 1 per bit, `[rows, 8 * bytes]`."""
    return (mask[..., None] & _BITS.to(mask.device)).ne_(0).flatten(1)
