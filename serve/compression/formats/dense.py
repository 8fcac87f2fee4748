"""Weights in a floating type of their own, beside activations in another: what a sensitive layer is kept in.

    bits per weight = 16 or 32

Products are made in float32 and rounded once. A float32 weight is multiplied as it lies; of a 16-bit one only a tile at
a time is ever widened.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.compression.formats.linear import CompressedLinear, LinearSpec, tiled_product

__all__ = ["DenseLinear"]


class DenseLinear(CompressedLinear):
    """Plain layout: `weight` `[out, in]` in `stored`, whatever the activations' type is."""

    weight: Tensor

    def __init__(self, spec: LinearSpec, stored: torch.dtype) -> None:
        super().__init__(spec)
        self.stored = stored
        self.declare("weight", (spec.out_features, spec.in_features), stored)

    @classmethod
    def from_weight(
        cls, spec: LinearSpec, weight: Tensor, stored: torch.dtype, bias: Tensor | None = None
    ) -> DenseLinear:
        layer = cls(spec, stored)
        layer.fill(weight=weight.to(stored), bias=bias)
        return layer

    @property
    def kernel(self) -> str:
        return f"{str(self.stored).removeprefix('torch.')} rows + GEMM"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        y = tiled_product(rows, self.out_features, lambda tile: self.weight[tile].float())
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def reference(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        return F.linear(x.double(), self.weight.double(), bias).to(x.dtype)

    def dequantize(self) -> Tensor:
        return self.weight.float()
