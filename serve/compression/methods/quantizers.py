"""Round-to-nearest, GPTQ and AWQ as the driver knows them: their stage's options in, grouped integer layers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from serve.compression.formats.grouped import GroupedLinear
from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.formats.linear import CompressedLinear, LinearSpec
from serve.compression.method import Group, InputStatistics, Need, Producer, Projection
from serve.compression.methods.awq import awq, search_scales
from serve.compression.methods.gptq import gptq
from serve.compression.methods.rtn import check_weight, round_to_nearest
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
        members, rounded = group.projections, self._round(group, statistics)
        return [GroupedLinear.from_weight(m.spec, weight, m.bias) for m, weight in zip(members, rounded, strict=True)]

    @abstractmethod
    def _round(self, group: Group, statistics: InputStatistics | None) -> list[GroupedWeight]:
        """Each projection's weight on the grid, in order."""


class RoundToNearestMethod(_GroupedMethod):
    """Each weight to its nearest point."""

    def __init__(self, stage: RoundToNearest) -> None:
        super().__init__(stage)

    def _round(self, group: Group, statistics: InputStatistics | None) -> list[GroupedWeight]:
        return [round_to_nearest(m.weight, self.grid, dtype=m.spec.dtype, name=m.name) for m in group.projections]


class GptqMethod(_GroupedMethod):
    """Column by column, each group seeing inputs that the groups before it already changed."""

    needs = Need.GRAM
    sequential = True

    def __init__(self, stage: Gptq) -> None:
        super().__init__(stage)
        self.reordered = stage.activation_order
        self.damping = stage.damping

    def _round(self, group: Group, statistics: InputStatistics | None) -> list[GroupedWeight]:
        """Siblings are stacked: their inputs are the same, and rows do not know of each other."""
        members, first = group.projections, group.projections[0]
        for projection in members:
            check_weight(projection.weight, projection.name)
        pruned = any(projection.mask is not None for projection in members)
        rounded = gptq(
            _stack(members),
            gram_of(statistics, first.name),
            self.grid,
            dtype=first.spec.dtype,
            damping=self.damping,
            activation_order=self.reordered,
            mask=torch.cat([_mask(projection) for projection in members]) if pruned else None,
            name=first.name,
        )
        return rounded.split([projection.spec.out_features for projection in members])


def _mask(projection: Projection) -> Tensor:
    return torch.ones_like(projection.weight, dtype=torch.bool) if projection.mask is None else projection.mask


def _stack(members: Sequence[Projection]) -> Tensor:
    """The weights of all, one below another; each member keeps its rows of it, so that none is held twice."""
    if len(members) == 1:
        return members[0].weight
    stacked = torch.cat([member.weight for member in members])
    heights = [len(member.weight) for member in members]
    for member, rows in zip(members, torch.split(stacked, heights), strict=True):
        member.weight = rows
    return stacked


class AwqMethod(_GroupedMethod):
    """Loud channels scaled up, and down again in the producer; without a producer only ranges are clipped."""

    needs = Need.GRAM

    def __init__(self, stage: Awq) -> None:
        super().__init__(stage)

    def _round(self, group: Group, statistics: InputStatistics | None) -> list[GroupedWeight]:
        members, gram = group.projections, gram_of(statistics, group.projections[0].name)
        factor = None if group.producer is None else self._scale(group, group.producer, statistics, gram)
        return [awq(m.weight, gram, self.grid, factor, dtype=m.spec.dtype, name=m.name) for m in members]

    def _scale(self, group: Group, producer: Producer, statistics: InputStatistics | None, gram: Tensor) -> Tensor:
        """The factor of each input, already taken out of the producer."""
        assert statistics is not None
        index = torch.arange(producer.channels, dtype=torch.float32, device=gram.device)
        channel = producer.spread(index).round().long()
        weights, name = [projection.weight for projection in group.projections], group.projections[0].name
        scale = search_scales(weights, gram, statistics.mean_abs, self.grid, channel=channel, name=name)
        producer.divide(scale)
        return scale[channel]


def gram_of(statistics: InputStatistics | None, name: str) -> Tensor:
    """The Gram matrix that calibration measured; raise `CompressionError` naming the layer where it saw nothing."""
    if statistics is None or statistics.gram is None:
        raise CompressionError(f"{name}: calibration never reached this layer; use more text, or skip the layer")
    return statistics.gram
