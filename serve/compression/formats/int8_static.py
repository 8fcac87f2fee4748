"""Static INT8: as `int8`, but every token is rounded on one scale per layer that calibration measured.

No maximum has to be found before a token can be rounded, which hardware with fixed pipelines needs. The price is that
what lies beyond the calibrated range is cut off, and that a quiet token uses few of the levels. The product over
integers is the same, so an answer still does not depend on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.compression.formats.int8 import Int8Linear
from serve.compression.formats.linear import LinearSpec

__all__ = ["Int8StaticLinear"]

_LEVELS = 127


class Int8StaticLinear(Int8Linear):
    """Plain layout: `weight` int8 `[out, in]`, `scale` float32 `[out]`, `input_scale` float32 `[]`."""

    metadata = ("scale", "input_scale")
    packable = False  # our kernels measure each token
    input_scale: Tensor

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.declare("input_scale", (), torch.float32)

    @property
    def kernel(self) -> str:
        return super().kernel.replace("int8", "int8-static", 1)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """On the layer's own scale; NaN and infinity make the token's output NaN, as they do with dynamic scales."""
        x = x.float()
        broken = ~x.isfinite().all(dim=-1, keepdim=True)
        tokens = (x / self.input_scale).round_().clamp_(-_LEVELS, _LEVELS).nan_to_num_()
        return tokens, torch.where(broken, torch.nan, self.input_scale)
