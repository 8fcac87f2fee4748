"""Round-to-nearest, GPTQ and AWQ as the driver knows them: their stage's options in, grouped integer layers out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from serve.compression.formats.grouped import GroupedLinear
from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.formats.linear import CompressedLinear, LinearSpec
from serve.compression.method import Group, InputStatistics, Need, Projection
from serve.compression.methods.awq import awq, search_scales
from serve.compression.methods.gptq import gptq
from serve.compression.methods.rtn import round_to_nearest
from serve.compression.stages import Awq, Gptq, Grouped, RoundToNearest
from serve.errors import CompressionError

__all__ = ["AwqMethod", "GptqMethod", "RoundToNearestMethod", "gram_of"]


class _GroupedMethod(ABC):
    """What the three share: the format, its shell, and one rounding per projection."""

    needs = Need.NOTHING
    sequential = False
    reordered = False

    def __init__(self, stage: Grouped) -> None:
        self.grid = IntegerGrid(stage.bits, stage.group_size, stage.symmetric)

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return GroupedLinear(spec, self.grid, reordered=self.reordered)

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        return [
            GroupedLinear.from_weight(projection.spec, self._round(projection, statistics), projection.bias)
            for projection in group.projections
        ]

    @abstractmethod
    def _round(self, projection: Projection, statistics: InputStatistics | None) -> GroupedWeight:
        """The projection's weight on the grid."""


class RoundToNearestMethod(_GroupedMethod):
    """Each weight to its nearest point."""

    def __init__(self, stage: RoundToNearest) -> None:
        super().__init__(stage)

    def _round(self, projection: Projection, statistics: InputStatistics | None) -> GroupedWeight:
        return round_to_nearest(projection.weight, self.grid, dtype=projection.spec.dtype, name=projection.name)


class GptqMethod(_GroupedMethod):
    """Column by column, each group seeing inputs that the groups before it already changed."""

    needs = Need.GRAM
    sequential = True

    def __init__(self, stage: Gptq) -> None:
        super().__init__(stage)
        self.reordered = stage.activation_order
        self.damping = stage.damping

    def _round(self, projection: Projection, statistics: InputStatistics | None) -> GroupedWeight:
        return gptq(
            projection.weight,
            gram_of(statistics, projection.name),
            self.grid,
            dtype=projection.spec.dtype,
            damping=self.damping,
            activation_order=self.reordered,
            mask=projection.mask,
            name=projection.name,
        )


class AwqMethod(_GroupedMethod):
    """Loud channels scaled up, and down again in the producer; without a producer only ranges are clipped."""

    needs = Need.GRAM

    def __init__(self, stage: Awq) -> None:
        super().__init__(stage)

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        first = group.projections[0]
        gram = gram_of(statistics, first.name)
        if group.producer is None or statistics is None:
            return super().quantize(group, statistics)
        index = torch.arange(group.producer.channels, dtype=torch.float32, device=gram.device)
        channel = group.producer.spread(index).round().long()
        weights = [projection.weight for projection in group.projections]
        scale = search_scales(weights, gram, statistics.mean_abs, self.grid, channel=channel, name=first.name)
        group.producer.divide(scale)
        spread = scale[channel]
        return [GroupedLinear.from_weight(p.spec, self._awq(p, gram, spread), p.bias) for p in group.projections]

    def _round(self, projection: Projection, statistics: InputStatistics | None) -> GroupedWeight:
        return self._awq(projection, gram_of(statistics, projection.name), None)

    def _awq(self, projection: Projection, gram: Tensor, scale: Tensor | None) -> GroupedWeight:
        return awq(projection.weight, gram, self.grid, scale, dtype=projection.spec.dtype, name=projection.name)


def gram_of(statistics: InputStatistics | None, name: str) -> Tensor:
    """The Gram matrix that calibration measured; raise `CompressionError` naming the layer where it saw nothing."""
    if statistics is None or statistics.gram is None:
        raise CompressionError(f"{name}: calibration never reached this layer; use more text, or skip the layer")
    return statistics.gram
