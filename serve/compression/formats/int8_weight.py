"""INT8 weights, floating activations: one 8-bit integer per weight, one scale per output row.

The activations are not touched, so the only error is the weights'. `_weight_int8pack_mm` reads half the bytes of 16-bit
weights, which is what decoding one sequence waits for; it wants its scales in the activations' type, so rows are
rounded on the grid of the scale *as stored* and the scale's own rounding costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.compression.formats.linear import CompressedLinear, LinearSpec, tiled_product

__all__ = ["Int8WeightLinear", "quantize_rows_for"]

_LEVELS = 127
_FLOAT32_TOKENS = 4
_ALIGNED_BYTES = 64
"""The kernel loads weights by 16 bytes, takes for granted that 16 divides their address, and crashes if not."""


def quantize_rows_for(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Absmax per row with scales of `dtype`: `weight [out, in]` to int8 `[out, in]` and scales `[out]`."""
    weight = weight.float()
    # Rounded up where the type rounds, so that the largest weight still lies on the grid.
    scale = (weight.abs().amax(dim=1) / _LEVELS * (1 + torch.finfo(dtype).eps / 2)).to(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    quantized = (weight / scale.float()[:, None]).round_().clamp_(-_LEVELS - 1, _LEVELS)
    return quantized.to(torch.int8), scale


class Int8WeightLinear(CompressedLinear):
    """Plain layout: `weight` int8 `[out, in]`, `scale` `[out]` in the activations' dtype."""

    metadata = ("scale",)
    weight: Tensor
    scale: Tensor

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.declare("weight", (spec.out_features, spec.in_features), torch.int8)
        self.declare("scale", (spec.out_features,), spec.dtype)

    def _prepare(self) -> None:
        # A mapped file is aligned as its header happens to be long.
        if self.weight.device.type == "cpu" and self.weight.data_ptr() % _ALIGNED_BYTES:
            self.weight = self.weight.clone()

    @property
    def kernel(self) -> str:
        return "int8-weight _weight_int8pack_mm" if self._by_kernel(1) else "int8-weight tiled product"

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features).contiguous()
        if self._by_kernel(tokens.shape[0]):
            y = torch._weight_int8pack_mm(tokens, self.weight, self.scale)
        else:
            y = tiled_product(tokens, self.out_features, self._tile).mul_(self.scale)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _by_kernel(self, tokens: int) -> bool:
        """Sixteen must divide the rows, past whose end it reads otherwise; in float32 it is slow at prefill."""
        if self.weight.device.type != "cpu" or self.in_features % 16:
            return False
        return self.spec.dtype == torch.bfloat16 or (self.spec.dtype == torch.float32 and tokens <= _FLOAT32_TOKENS)

    def _tile(self, rows: slice) -> Tensor:
        return self.weight[rows].to(self.spec.dtype)

    def reference(self, x: Tensor) -> Tensor:
        y = F.linear(x.float(), self.dequantize())
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def dequantize(self) -> Tensor:
        return self.weight.float() * self.scale.float()[:, None]
