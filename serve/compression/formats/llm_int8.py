"""LLM.int8(): 8-bit products with the outlier columns of the activations left in 16 bits (bitsandbytes, CUDA).

Large models carry a few activation channels whose values dwarf the rest; rounding a token on their scale would erase
everything else (Dettmers et al., arXiv 2208.07339). Columns that exceed `threshold` anywhere in the batch are
multiplied in 16 bits, the others in 8. Which columns those are depends on the whole batch, so one answer can
depend on its neighbours: the one format here for which that is so.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.compression.formats.linear import CompressedLinear, LinearSpec

__all__ = ["LlmInt8Linear"]


class LlmInt8Linear(CompressedLinear):
    """Plain layout: `weight` int8 `[out, in]`, `absmax` float32 `[out]` (127 steps to it)."""

    metadata = ("absmax",)
    weight: Tensor
    absmax: Tensor

    def __init__(self, spec: LinearSpec, threshold: float) -> None:
        super().__init__(spec)
        self.threshold = threshold
        self.declare("weight", (spec.out_features, spec.in_features), torch.int8)
        self.declare("absmax", (spec.out_features,), torch.float32)

    @property
    def kernel(self) -> str:
        return "llm-int8 bitsandbytes.matmul"

    def forward(self, x: Tensor) -> Tensor:
        bitsandbytes = import_module("bitsandbytes")
        state: Any = bitsandbytes.MatmulLtState()
        state.threshold, state.has_fp16_weights = self.threshold, False
        state.CB, state.SCB = self.weight, self.absmax
        y: Tensor = bitsandbytes.matmul(x, self.weight, bias=self.bias, state=state)
        return y

    def reference(self, x: Tensor) -> Tensor:
        y = F.linear(x.float(), self.dequantize())
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def dequantize(self) -> Tensor:
        return self.weight.float() * (self.absmax[:, None] / 127)
