"""FP8: weights and activations in 8-bit floating point (e4m3: 4 bits of exponent, 3 of mantissa; up to 448).

Each row of the weight, and at every call each token of the input, is divided by its largest magnitude / 448 and rounded
to the nearest number of the format (Micikevicius et al., arXiv 2209.05433). Small values keep three bits of their own,
which integers on one scale do not give them. Scales are per token and never per batch, so that an answer does not
depend on its neighbours:

    y[t, o] = (sum_i q_x[t, i] q_w[o, i]) * scale_x[t] * scale_w[o] + bias[o]

Kernel: `torch._scaled_mm` with row-wise scales, on CUDA devices of compute capability 8.9 and above (Ada, Hopper,
Blackwell). It wants dimensions that divide by 16, so the prepared weight is padded, and answers in bf16. Elsewhere
there is no such product: the method refuses, and only the reference runs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.compression.formats.linear import CompressedLinear, LinearSpec, Storage

__all__ = ["Fp8Linear", "multiplies_fp8", "quantize_rows_fp8"]

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_SMALLEST = torch.finfo(torch.float32).tiny
_MULTIPLE = 16
_LEAST_CAPABILITY = (8, 9)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device has a product of 8-bit floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax per row: `x [rows, in]` to e4m3 `[rows, in]` and float32 scales `[rows]`. An all-zero row stays zero.

    A NaN or an infinity makes its whole row NaN.
    """
    x = x.float()
    scale = (x.abs().amax(dim=1) / _LARGEST).clamp_min(_SMALLEST)
    return (x / scale[:, None]).clamp_(-_LARGEST, _LARGEST).to(FP8), scale


class Fp8Linear(CompressedLinear):
    """Plain layout: `weight` e4m3 `[out, in]`, `scale` float32 `[out]`."""

    metadata: ClassVar[tuple[str, ...]] = ("scale",)
    weight: Tensor
    scale: Tensor

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.declare("weight", (spec.out_features, spec.in_features), FP8)
        self.declare("scale", (spec.out_features,), torch.float32)
        self._plain = super().storage()

    @property
    def kernel(self) -> str:
        return "fp8 _scaled_mm" if self.weight.is_cuda else "fp8 reference"

    def storage(self) -> Storage:
        return self._plain

    def _prepare(self) -> None:
        rows, columns = (-(-n // _MULTIPLE) * _MULTIPLE for n in self.weight.shape)
        if self.weight.is_cuda and (rows, columns) != tuple(self.weight.shape):
            self.weight = _padded(self.weight, rows, columns)
            self.scale = F.pad(self.scale, (0, rows - self.out_features), value=1.0)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return self.reference(x)
        tokens, scale = quantize_rows_fp8(x.reshape(-1, self.in_features))
        if tokens.shape[1] != self.weight.shape[1]:
            tokens = _padded(tokens, tokens.shape[0], self.weight.shape[1])
        y = torch._scaled_mm(
            tokens, self.weight.t(), scale_a=scale[:, None], scale_b=self.scale[None], out_dtype=torch.bfloat16
        )
        y = y[:, : self.out_features].to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def reference(self, x: Tensor) -> Tensor:
        tokens, scale = quantize_rows_fp8(x.reshape(-1, self.in_features))
        product = (tokens.double() @ self.weight[: self.out_features, : self.in_features].double().t()).float()
        y = product * scale[:, None] * self.scale[: self.out_features]
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        return self.weight.float() * self.scale[:, None]


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros, through bytes: torch cannot pad 8-bit floats."""
    padding = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return F.pad(matrix.view(torch.uint8), padding).view(FP8)
