"""Methods that only round: each projection by itself, from nothing but its own numbers.

`int8`, `int8-weight` and `fp8` divide each row by its largest magnitude. With 255 levels a row's rounding error is
about 0.4 % of its largest weight, small enough that no calibration is needed. What breaks 8-bit models is outliers in
the *activations* (Dettmers et al., arXiv 2208.07339), which is why `int8` and `fp8` scale those per token and never per
batch, and `llm-int8` keeps the loud columns in 16 bits. `nf4` takes 16 levels that fit a normal distribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from serve.compression.formats.fp8 import Fp8Linear, multiplies_fp8, quantize_rows_fp8
from serve.compression.formats.int8 import Int8Linear, quantize_rows
from serve.compression.formats.int8_weight import Int8WeightLinear, quantize_rows_for
from serve.compression.formats.linear import CompressedLinear, LinearSpec
from serve.compression.formats.llm_int8 import LlmInt8Linear
from serve.compression.formats.nf4 import Nf4Linear, quantize_blocks
from serve.compression.method import Group, InputStatistics, Need, Projection
from serve.compression.stages import Fp8, Int8, Int8Weight, LlmInt8, Nf4
from serve.errors import UnsupportedHardware

__all__ = ["Fp8Method", "Int8Method", "Int8WeightMethod", "LlmInt8Method", "Nf4Method"]


class _Rounding(ABC):
    """What they share: no statistics, any hardware, a layer per projection."""

    needs = Need.NOTHING
    sequential = False

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        layers: list[CompressedLinear] = []
        for projection in group.projections:
            layer = self.shell(projection.spec)
            layer.fill(**self._tensors(projection), bias=projection.bias)
            layers.append(layer)
        return layers

    @abstractmethod
    def shell(self, spec: LinearSpec) -> CompressedLinear:
        """The layer without values."""

    @abstractmethod
    def _tensors(self, projection: Projection) -> dict[str, Tensor]:
        """What the layer declares, bias excepted."""


class Int8Method(_Rounding):
    """Rows to 8 bits; the format quantizes activations as they come."""

    def __init__(self, stage: Int8) -> None:
        self.stage = stage

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return Int8Linear(spec)

    def _tensors(self, projection: Projection) -> dict[str, Tensor]:
        weight, scale = quantize_rows(projection.weight)
        return {"weight": weight, "scale": scale}


class Int8WeightMethod(_Rounding):
    """Rows to 8 bits; activations stay as they are."""

    def __init__(self, stage: Int8Weight) -> None:
        self.stage = stage

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return Int8WeightLinear(spec)

    def _tensors(self, projection: Projection) -> dict[str, Tensor]:
        weight, scale = quantize_rows_for(projection.weight, projection.spec.dtype)
        return {"weight": weight, "scale": scale}


class Fp8Method(_Rounding):
    """Rows to 8-bit floats; the format rounds activations as they come."""

    def __init__(self, stage: Fp8) -> None:
        self.stage = stage

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        if not multiplies_fp8(device):
            where = "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
            raise UnsupportedHardware(
                f"{self.stage.name}: {where} has no product of 8-bit floats (CUDA devices from compute capability 8.9 "
                "have one: Ada, Hopper, Blackwell); use int8, which is as small and runs everywhere"
            )

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return Fp8Linear(spec)

    def _tensors(self, projection: Projection) -> dict[str, Tensor]:
        weight, scale = quantize_rows_fp8(projection.weight)
        return {"weight": weight, "scale": scale}


class LlmInt8Method(_Rounding):
    """8 bits per row, outlier columns of the activations in 16."""

    def __init__(self, stage: LlmInt8) -> None:
        self.stage = stage

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cuda":
            raise UnsupportedHardware(
                f"{self.stage.name}: bitsandbytes runs it on CUDA only; on {device.type} use int8, "
                "which scales activations per token instead"
            )

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return LlmInt8Linear(spec, self.stage.threshold)

    def _tensors(self, projection: Projection) -> dict[str, Tensor]:
        weight, scale = quantize_rows(projection.weight)
        return {"weight": weight, "absmax": scale * 127}


class Nf4Method(_Rounding):
    """4-bit NormalFloat in blocks."""

    def __init__(self, stage: Nf4) -> None:
        self.stage = stage

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return Nf4Linear(spec, self.stage.block_size, double_quantization=self.stage.double_quantization)

    def _tensors(self, projection: Projection) -> dict[str, Tensor]:
        block_size, double = self.stage.block_size, self.stage.double_quantization
        return quantize_blocks(projection.weight, block_size, double_quantization=double)
