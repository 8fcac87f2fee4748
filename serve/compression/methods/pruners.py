"""Magnitude, Wanda and SparseGPT as the driver knows them: they set a projection's `weight` and `mask` in place."""

from __future__ import annotations

from torch import Tensor

from serve.compression.method import Group, InputStatistics, Need, Projection
from serve.compression.methods.magnitude import magnitude_mask
from serve.compression.methods.quantizers import gram_of
from serve.compression.methods.sparsegpt import sparsegpt
from serve.compression.methods.wanda import wanda_mask
from serve.compression.stages import Magnitude, SparseGpt, Wanda
from serve.errors import CompressionError

__all__ = ["MagnitudePruner", "SparseGptPruner", "WandaPruner", "ZerosStay"]


class MagnitudePruner:
    """The smallest weights of each matrix go."""

    needs = Need.NOTHING

    def __init__(self, stage: Magnitude) -> None:
        self.stage = stage

    def prune(self, group: Group, statistics: InputStatistics | None) -> None:
        for projection in group.projections:
            mask = magnitude_mask(projection.weight, self.stage.sparsity, self.stage.pattern, projection.name)
            _apply(projection, projection.weight, mask)


class WandaPruner:
    """The smallest weights times inputs of each row go."""

    needs = Need.MOMENTS

    def __init__(self, stage: Wanda) -> None:
        self.stage = stage

    def prune(self, group: Group, statistics: InputStatistics | None) -> None:
        for projection in group.projections:
            if statistics is None:
                raise CompressionError(f"{projection.name}: calibration never reached this layer; use more text")
            loud = statistics.mean_square
            mask = wanda_mask(projection.weight, loud, self.stage.sparsity, self.stage.pattern, projection.name)
            _apply(projection, projection.weight, mask)


class SparseGptPruner:
    """The cheapest weights go, and the rest makes up for them."""

    needs = Need.GRAM

    def __init__(self, stage: SparseGpt) -> None:
        self.stage = stage

    def prune(self, group: Group, statistics: InputStatistics | None) -> None:
        for projection in group.projections:
            gram = gram_of(statistics, projection.name)
            pruned = sparsegpt(projection.weight, gram, self.stage.sparsity, self.stage.pattern, name=projection.name)
            _apply(projection, *pruned)


class ZerosStay:
    """Removes nothing: what an earlier run pruned is to stay zero."""

    needs = Need.NOTHING

    def prune(self, group: Group, statistics: InputStatistics | None) -> None:
        for projection in group.projections:
            _apply(projection, projection.weight, projection.weight != 0)


def _apply(projection: Projection, weight: Tensor, mask: Tensor) -> None:
    """What an earlier pruner removed stays removed."""
    projection.mask = mask if projection.mask is None else mask & projection.mask
    projection.weight = weight * projection.mask
