"""The two formats that bitsandbytes multiplies: NF4 and LLM.int8(). Both only round."""

from __future__ import annotations

import torch

from serve.compression.formats.int8 import quantize_rows
from serve.compression.formats.linear import CompressedLinear, LinearSpec
from serve.compression.formats.llm_int8 import LlmInt8Linear
from serve.compression.formats.nf4 import Nf4Linear, quantize_blocks
from serve.compression.method import Group, InputStatistics, Need
from serve.compression.stages import LlmInt8, Nf4
from serve.errors import UnsupportedHardware

__all__ = ["LlmInt8Method", "Nf4Method"]


class Nf4Method:
    """4-bit NormalFloat in blocks."""

    needs = Need.NOTHING
    sequential = False

    def __init__(self, stage: Nf4) -> None:
        self.stage = stage

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        layers: list[CompressedLinear] = []
        for projection in group.projections:
            layer = self.shell(projection.spec)
            tensors = quantize_blocks(
                projection.weight, self.stage.block_size, double_quantization=self.stage.double_quantization
            )
            layer.fill(**tensors, bias=projection.bias)
            layers.append(layer)
        return layers

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return Nf4Linear(spec, self.stage.block_size, double_quantization=self.stage.double_quantization)


class LlmInt8Method:
    """8 bits per row, outlier columns of the activations in 16."""

    needs = Need.NOTHING
    sequential = False

    def __init__(self, stage: LlmInt8) -> None:
        self.stage = stage

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cuda":
            raise UnsupportedHardware(
                f"{self.stage.name}: bitsandbytes runs it on CUDA only; on {device.type} use int8, "
                "which scales activations per token instead"
            )

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        layers: list[CompressedLinear] = []
        for projection in group.projections:
            layer = self.shell(projection.spec)
            weight, scale = quantize_rows(projection.weight)
            layer.fill(weight=weight, absmax=scale * 127, bias=projection.bias)
            layers.append(layer)
        return layers

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return LlmInt8Linear(spec, self.stage.threshold)
