"""Absmax rounding to 8 bits: each row divided by its largest magnitude, and rounded.

With 255 levels a row's rounding error is about 0.4 % of its largest weight, small enough that no calibration is needed.
What breaks 8-bit models is outliers in the *activations* (Dettmers et al., arXiv 2208.07339), which is why `int8`
scales those per token and never per batch.
"""

from __future__ import annotations

import torch

from serve.compression.formats.int8 import Int8Linear, quantize_rows
from serve.compression.formats.int8_weight import Int8WeightLinear, quantize_rows_for
from serve.compression.formats.linear import CompressedLinear, LinearSpec
from serve.compression.method import Group, InputStatistics, Need
from serve.compression.stages import Int8, Int8Weight

__all__ = ["Int8Method", "Int8WeightMethod"]


class Int8Method:
    """Rows to 8 bits; the format quantizes activations as they come."""

    needs = Need.NOTHING
    sequential = False

    def __init__(self, stage: Int8) -> None:
        self.stage = stage

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        layers: list[CompressedLinear] = []
        for projection in group.projections:
            layer = self.shell(projection.spec)
            weight, scale = quantize_rows(projection.weight)
            layer.fill(weight=weight, scale=scale, bias=projection.bias)
            layers.append(layer)
        return layers

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return Int8Linear(spec)


class Int8WeightMethod:
    """Rows to 8 bits; activations stay as they are."""

    needs = Need.NOTHING
    sequential = False

    def __init__(self, stage: Int8Weight) -> None:
        self.stage = stage

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        layers: list[CompressedLinear] = []
        for projection in group.projections:
            layer = self.shell(projection.spec)
            weight, scale = quantize_rows_for(projection.weight, projection.spec.dtype)
            layer.fill(weight=weight, scale=scale, bias=projection.bias)
            layers.append(layer)
        return layers

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return Int8WeightLinear(spec)
