"""Static INT8 as the driver knows it: scales measured once, outliers smoothed into the weights where that is possible.

One scale serves all channels of a layer's input, so one loud channel would cost all others their levels. SmoothQuant
(`smoothquant`) moves loudness into the weights, which have a scale per row, and its inverse into the producer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.compression.formats.int8 import quantize_rows
from serve.compression.formats.int8_static import Int8StaticLinear
from serve.compression.formats.linear import CompressedLinear, LinearSpec
from serve.compression.method import Group, InputStatistics, Need
from serve.compression.methods.smoothquant import smooth_scales
from serve.compression.stages import Int8Static
from serve.errors import CompressionError

__all__ = ["Int8StaticMethod"]

_LEVELS = 127


class Int8StaticMethod:
    """Weights by row, inputs by one calibrated scale per group."""

    needs = Need.MOMENTS
    sequential = False

    def __init__(self, stage: Int8Static) -> None:
        self.stage = stage

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return Int8StaticLinear(spec)

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        name = group.projections[0].name
        if statistics is None or statistics.tokens == 0:
            raise CompressionError(f"{name}: calibration never reached this layer; use more text, or skip the layer")
        factor = self._smooth(group, statistics)
        largest = (statistics.max_abs / factor).amax()
        if not bool(largest.isfinite()):
            raise CompressionError(f"{name}: its calibration inputs contain NaN or infinity; calibrate in float32")
        input_scale = (largest / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
        layers: list[CompressedLinear] = []
        for projection in group.projections:
            layer = self.shell(projection.spec)
            weight, scale = quantize_rows(projection.weight * factor)
            layer.fill(weight=weight, scale=scale, input_scale=input_scale, bias=projection.bias)
            layers.append(layer)
        return layers

    def _smooth(self, group: Group, statistics: InputStatistics) -> Tensor:
        """Factor per input, already taken out of the producer; all ones where nothing can absorb it."""
        producer, weights = group.producer, [projection.weight for projection in group.projections]
        if producer is None or self.stage.smooth == 0:
            return torch.ones_like(statistics.max_abs)
        index = torch.arange(producer.channels, dtype=torch.float32, device=statistics.max_abs.device)
        channel = producer.spread(index).round().long()
        alpha, name = self.stage.smooth, group.projections[0].name
        scale = smooth_scales(weights, statistics.max_abs, alpha, channel=channel, name=name)
        producer.divide(scale)
        return producer.spread(scale)
