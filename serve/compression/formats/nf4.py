"""NF4: four bits per weight on a grid that fits a normal distribution, one scale per block.

Weights are close to normally distributed, so the 16 levels are its quantiles rather than evenly spaced (QLoRA, Dettmers
et al., arXiv 2305.14314). The matrix is cut, row after row, into blocks of `block_size` values; each is divided by its
largest magnitude and every value replaced by its nearest level's index, two to a byte. *Double quantization* stores the
blocks' scales in 8 bits as well, in blocks of 256 with one offset: 4.5 bits per weight become 4.13.

Kernels: our product where this CPU has `serve.kernels`; bitsandbytes' fused product on CPUs with AVX512-BF16 and on
CUDA; elsewhere the layer's weight is decoded for each call and thrown away. Both CPU kernels want their own packing and
scales in bf16, ours the levels too. No 16-bit copy is kept anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.compression.formats.linear import CompressedLinear, LinearSpec, Storage, tiled_product
from serve.kernels import PackedLinear

__all__ = ["LEVELS", "Nf4Linear", "bitsandbytes_functional", "quantize_blocks"]

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero. They are `get_4bit_type("nf4")`, without an
# import that takes a second.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SCALE_BLOCK = 256
_PACKED_ROWS = 32


@cache
def bitsandbytes_functional() -> Any:
    """`bitsandbytes.functional`, imported when first needed and without its advice about optional kernels."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    finally:
        logger.setLevel(level)
    return functional


def quantize_blocks(weight: Tensor, block_size: int, *, double_quantization: bool) -> dict[str, Tensor]:
    """`weight [out, in]` to the tensors that `Nf4Linear` declares."""
    packed, state = bitsandbytes_functional().quantize_4bit(
        weight.float().contiguous(), blocksize=block_size, compress_statistics=double_quantization, quant_type="nf4"
    )
    if not double_quantization:
        return {"weight": packed.reshape(-1), "absmax": state.absmax.reshape(-1)}
    return {
        "weight": packed.reshape(-1),
        "absmax": state.absmax.reshape(-1),
        "absmax_scale": state.state2.absmax.reshape(-1),
        "absmax_code": state.state2.code,
        "absmax_offset": state.offset.reshape(()),
    }


class Nf4Linear(CompressedLinear):
    """Plain layout: `weight` uint8 `[ceil(out * in / 2)]`, `absmax` float32 `[blocks]`.

    With double quantization `absmax` is uint8, and `absmax_scale [blocks / 256]`, `absmax_code [256]` and
    `absmax_offset []` (float32) decode it.
    """

    metadata = ("absmax", "absmax_scale", "absmax_code", "absmax_offset")
    weight: Tensor
    absmax: Tensor
    absmax_scale: Tensor
    absmax_code: Tensor
    absmax_offset: Tensor

    def __init__(self, spec: LinearSpec, block_size: int, *, double_quantization: bool) -> None:
        super().__init__(spec)
        self.block_size, self.double_quantization = block_size, double_quantization
        count = spec.in_features * spec.out_features
        blocks = -(-count // block_size)
        self.declare("weight", (-(-count // 2),), torch.uint8)
        self.declare("absmax", (blocks,), torch.uint8 if double_quantization else torch.float32)
        if double_quantization:
            self.declare("absmax_scale", (-(-blocks // _SCALE_BLOCK),), torch.float32)
            self.declare("absmax_code", (256,), torch.float32)
            self.declare("absmax_offset", (), torch.float32)
        self._packed: Tensor | None = None
        self._packed_scale: Tensor | None = None
        self._code: Tensor | None = None

    @property
    def kernel(self) -> str:
        if self.packed is not None:
            return "nf4 packed"
        if self._packed is not None or self.weight.is_cuda:
            return "nf4 bitsandbytes.gemv_4bit"
        return "nf4 decoded per call"

    def _prepare(self) -> None:
        self._code = torch.tensor(LEVELS, device=self.weight.device)
        if self.packable and self.in_features % self.block_size == 0:
            self.packed = self._tiles()
        elif self._can_pack(functional := bitsandbytes_functional()):
            packed, state = functional._convert_weight_packed_for_cpu(self.weight[:, None], self._state())
            self._packed, self._packed_scale = packed, state.absmax
        else:
            return
        for name in ("weight", *self.metadata):
            if name in self._buffers:
                setattr(self, name, getattr(self, name).new_empty(0))

    def _tiles(self) -> PackedLinear:
        assert self._code is not None
        scales = self._decoded_absmax().view(self.out_features, -1).to(torch.bfloat16)
        return PackedLinear.code4(
            self.weight, scales, None, self._code, self.block_size, self.bias, inputs=self.in_features, order="pairs"
        )

    def _codes(self) -> Tensor:
        """One level's index a byte, `[out * in]`."""
        count = self.in_features * self.out_features
        return torch.stack([self.weight >> 4, self.weight & 15], dim=1).reshape(-1)[:count]

    def _can_pack(self, functional: Any) -> bool:
        return (
            self.weight.device.type == "cpu"
            and self.spec.dtype == torch.bfloat16
            and self.out_features % _PACKED_ROWS == 0
            and self.in_features % self.block_size == 0
            and self.block_size < 2048
            and functional.has_avx512bf16()
        )

    def storage(self) -> Storage:
        plain = super().storage()
        if self.packed is not None:
            weight_bytes = self.in_features * self.out_features // 2
            return Storage(weight_bytes, weight_bytes * 4 // self.block_size, plain.bias_bytes)
        if self._packed is None or self._packed_scale is None:
            return plain
        return Storage(self._packed.nbytes, self._packed_scale.nbytes, plain.bias_bytes)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None and x.dtype is torch.bfloat16:
            return self.multiply_packed(self.packed, x)
        if self._packed is None:
            y = self._product(x)
        else:
            multiply: Callable[..., Tensor] = torch.ops.bitsandbytes.gemv_4bit
            y = multiply(x, self._packed, self._shape, self._packed_scale, self._code, self.block_size)
        return y if self.bias is None else y.add_(self.bias)

    def _product(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features)
        if x.is_cuda and tokens.shape[0] == 1 and self.in_features % self.block_size == 0:
            y: Tensor = bitsandbytes_functional().gemv_4bit(x, self.weight[:, None].t(), state=self._state())
            return y
        scales = self._decoded_absmax()
        y = tiled_product(tokens, self.out_features, lambda rows: self._tile(rows, scales, x.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def _tile(self, rows: slice, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight, decoded; the library's decoder is trusted only where blocks do not cross rows."""
        if self.in_features % self.block_size:
            return self.dequantize()[rows].to(dtype)
        first, last = rows.start * self.in_features, rows.stop * self.in_features
        decode: Callable[..., Tensor] = torch.ops.bitsandbytes.dequantize_4bit
        packed = self.weight[first // 2 : last // 2, None]
        absmax = scales[first // self.block_size : last // self.block_size]
        return decode(packed, absmax, self.block_size, "nf4", [rows.stop - rows.start, self.in_features], dtype)

    def _decoded_absmax(self) -> Tensor:
        """The blocks' scales in float32 `[blocks]`."""
        if not self.double_quantization:
            return self.absmax
        scale = self.absmax_scale.repeat_interleave(_SCALE_BLOCK)[: self.absmax.numel()]
        return self.absmax_code[self.absmax.int()] * scale + self.absmax_offset

    @property
    def _shape(self) -> list[int]:
        return [self.out_features, self.in_features]

    def _state(self, dtype: torch.dtype | None = None) -> Any:
        """bitsandbytes' description of the plain layout."""
        functional = bitsandbytes_functional()
        nested = {}
        if self.double_quantization:
            inner = functional.QuantState(
                absmax=self.absmax_scale, code=self.absmax_code, blocksize=_SCALE_BLOCK, dtype=torch.float32
            )
            nested = {"offset": self.absmax_offset, "state2": inner}
        return functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size(self._shape),
            code=torch.tensor(LEVELS, device=self.absmax.device),
            blocksize=self.block_size,
            quant_type="nf4",
            dtype=dtype or self.spec.dtype,
            **nested,
        )

    def reference(self, x: Tensor) -> Tensor:
        y = F.linear(x.float(), self.dequantize())
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def dequantize(self) -> Tensor:
        absmax = self._decoded_absmax()
        code, codes = torch.tensor(LEVELS, device=self.weight.device), self._codes()
        values: Tensor = code[codes.int()] * absmax.repeat_interleave(self.block_size)[: codes.numel()]
        return values.view(self._shape)
