"""How numbers are kept that no quantizer changes: without the zeros that a pruner made, or in a type of their own."""

from __future__ import annotations

import torch

from serve.compression.formats.dense import DenseLinear
from serve.compression.formats.linear import CompressedLinear, LinearSpec
from serve.compression.formats.sparse import SparseLinear
from serve.compression.method import Group, InputStatistics, Need

__all__ = ["DenseStorage", "SparseStorage"]


class SparseStorage:
    """Stores what is not zero, in the activations' type."""

    needs = Need.NOTHING
    sequential = True  # as the pruners before it

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        return [SparseLinear.from_dense(p.spec, p.weight, p.bias) for p in group.projections]

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return SparseLinear(spec)


class DenseStorage:
    """Stores a layer in another floating type than the rest of the model."""

    needs = Need.NOTHING
    sequential = True

    def __init__(self, stored: torch.dtype) -> None:
        self.stored = stored

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        return [DenseLinear.from_weight(p.spec, p.weight, self.stored, p.bias) for p in group.projections]

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return DenseLinear(spec, self.stored)
