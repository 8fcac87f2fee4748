"""What follows a pruner where no quantizer does: the numbers stay, the zeros are left out."""

from __future__ import annotations

import torch

from serve.compression.formats.linear import CompressedLinear, LinearSpec
from serve.compression.formats.sparse import SparseLinear
from serve.compression.method import Group, InputStatistics, Need

__all__ = ["SparseStorage"]


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
