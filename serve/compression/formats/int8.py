"""INT8 x INT8: weights in 8 bits per output channel, activations in 8 bits per token.

Each row of the weight is divided by its largest magnitude / 127 and rounded. At every call each token's activations are
treated the same way, so the product itself is over small integers: exact, and therefore the same whatever else is in
the batch. The two scales are multiplied back in afterwards:

    y[t, o] = (sum_i q_x[t, i] q_w[o, i]) * scale_w[o] * scale_x[t] + bias[o]

Kernels: our product where this CPU has `serve.kernels` and the activations are bf16; oneDNN's VNNI product where the
CPU has it (it wants *unsigned* activations: the stored byte is q + 128, zero point 128); `_int_mm` elsewhere. All give
the same integers as the reference.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from serve.compression.formats.linear import CompressedLinear, LinearSpec, Storage
from serve.kernels import PackedLinear

__all__ = ["Int8Linear", "quantize_rows", "quantize_tokens"]

_LEVELS = 127
_ZERO_POINT = 128
_SMALLEST = torch.finfo(torch.float32).tiny


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax per row: `weight [out, in]` to int8 `[out, in]` and float32 scales `[out]`. An all-zero row stays zero."""
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / _LEVELS).clamp_min(_SMALLEST)
    quantized = (weight / scale[:, None]).round_().clamp_(-_LEVELS, _LEVELS)
    return quantized.to(torch.int8), scale


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax per token: `x [tokens, in]` to whole numbers in -127..127 (float32) and scales `[tokens, 1]`.

    A NaN or an infinity among a token's activations makes its scale NaN or infinite, and so its whole output NaN.
    """
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / _LEVELS).clamp_min_(_SMALLEST)
    return (x / scale).round_(), scale


class Int8Linear(CompressedLinear):
    """Plain layout: `weight` int8 `[out, in]`, `scale` float32 `[out]`."""

    metadata: ClassVar[tuple[str, ...]] = ("scale",)
    weight: Tensor
    scale: Tensor

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.declare("weight", (spec.out_features, spec.in_features), torch.int8)
        self.declare("scale", (spec.out_features,), torch.float32)
        self._packed: Tensor | None = None
        self._zero_points: Tensor | None = None

    def _prepare(self) -> None:
        if self.packable:
            self.packed = PackedLinear.int8(self.weight, self.scale, self.bias)
            self.weight = self.weight.new_empty(0)
            return
        if self.weight.device.type != "cpu" or not has_int8_dot():
            return
        self._packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        self._zero_points = _zero_points(self.out_features)
        self.weight = self.weight.new_empty(0)

    @property
    def kernel(self) -> str:
        if self.packed is not None:
            return "int8 packed"
        return "int8 onednn.qlinear_pointwise" if self._packed is not None else "int8 _int_mm"

    def storage(self) -> Storage:
        plain = super().storage()
        return Storage(self.out_features * self.in_features, plain.metadata_bytes, plain.bias_bytes)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None and x.dtype is torch.bfloat16:
            return self.multiply_packed(self.packed, x)
        tokens, scale = self.quantize_input(x.reshape(-1, self.in_features))
        if self._packed is not None:
            product = self._onednn(tokens)
        else:
            product = _int_mm(tokens.to(torch.int8), self.weight).float().mul_(self.scale)
        return self._finish(product, scale, x)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [tokens, in]` as whole numbers in -127..127 (float32), and what one of them is worth `[tokens, 1]`."""
        return quantize_tokens(x)

    def _onednn(self, tokens: Tensor) -> Tensor:
        unsigned = tokens.add_(_ZERO_POINT).to(torch.uint8)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, _ZERO_POINT, self._packed, self.scale, self._zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product

    def _finish(self, product: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        y = product.mul_(scale)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def reference(self, x: Tensor) -> Tensor:
        tokens, scale = self.quantize_input(x.reshape(-1, self.in_features))
        product = (tokens.int() @ self.weight.int().t()).float() * self.scale
        return self._finish(product, scale, x)

    def dequantize(self) -> Tensor:
        return self.weight.float() * self.scale[:, None]


def has_int8_dot() -> bool:
    """Whether this CPU multiplies bytes exactly and fast (VNNI); without it oneDNN may saturate in 16 bits."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability.startswith("AVX512") and bool(torch.cpu._is_vnni_supported())


_shared_zeros: dict[int, Tensor] = {}


def _zero_points(rows: int) -> Tensor:
    """The weights' zero points, all zero: one tensor for all layers of that height."""
    return _shared_zeros.setdefault(rows, torch.zeros(rows, dtype=torch.int32))


def _int_mm(tokens: Tensor, weight: Tensor) -> Tensor:
    """int8 `[tokens, in]` x int8 `[out, in]` to int32, padded to what CUDA's kernel accepts."""
    if tokens.device.type == "cpu":
        return torch._int_mm(tokens, weight.t())
    rows, columns, outputs = tokens.shape[0], tokens.shape[1], weight.shape[0]
    tokens = _pad(tokens, max(32, -(-rows // 8) * 8), -(-columns // 8) * 8)
    weight = _pad(weight, -(-outputs // 8) * 8, -(-columns // 8) * 8)
    return torch._int_mm(tokens, weight.t())[:rows, :outputs]


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    if matrix.shape == (rows, columns):
        return matrix
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))
