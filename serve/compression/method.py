"""The plug-in protocol: what a compression method is asked for, and what it is given.

A method is only the mathematics. It says which statistics of a projection's inputs it needs, and works on one *group*
at a time: sibling projections that read the same input, with what produces that input before them. The driver
(`serve.compression.compress`) owns everything else: walking, calibration, devices, memory, progress.

There are two kinds. A `Pruner` changes values and leaves them dense. A `Quantizer` turns each projection into a layer
of some format, and can build that layer empty so that a saved artifact loads into it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from serve.compression.formats.linear import CompressedLinear, LinearSpec

__all__ = ["Group", "InputStatistics", "Need", "Producer", "Projection", "Pruner", "Quantizer"]


class Need(IntEnum):
    """What a method wants to know about its inputs; each level includes the ones before it."""

    NOTHING = 0
    MOMENTS = 1  # per channel: mean magnitude, largest magnitude, mean square
    GRAM = 2  # the mean outer product X^T X / tokens as well


@dataclass(frozen=True)
class InputStatistics:
    """What calibration saw at the input of one group, over `tokens` tokens. All float32; `gram` is `[in, in]`."""

    tokens: int
    mean_abs: Tensor  # [in]
    max_abs: Tensor  # [in]
    mean_square: Tensor  # [in]
    gram: Tensor | None = None


@dataclass
class Projection:
    """One linear layer's values: `weight` float32 `[out_features, in_features]` however the model stores it.

    `mask` is True where a pruner kept the weight; every later stage must keep the others at zero.
    """

    spec: LinearSpec
    weight: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None

    @property
    def name(self) -> str:
        return self.spec.name


class Producer(Protocol):
    """What makes a group's input, if a per-channel factor can be folded into it (a norm, or the projection before)."""

    @property
    def channels(self) -> int:
        """How many independent factors there are (fewer than inputs where heads share values, as v for o)."""
        ...

    def spread(self, scale: Tensor) -> Tensor:
        """Repeat one factor per channel `[channels]` to one per input of the group `[in_features]`."""
        ...

    def divide(self, scale: Tensor) -> None:
        """Divide what is produced by `scale [channels]`, in place."""
        ...


@dataclass
class Group:
    """Sibling projections that share one input, and what can absorb a scale before them (None: nothing can)."""

    projections: list[Projection]
    producer: Producer | None = field(default=None)


@runtime_checkable
class Pruner(Protocol):
    """Changes values: sets `weight` and `mask` of each projection in place."""

    needs: Need

    def prune(self, group: Group, statistics: InputStatistics | None) -> None: ...


@runtime_checkable
class Quantizer(Protocol):
    """Chooses the stored values.

    `sequential`: whether a group should see inputs made by the *compressed* groups before it in the same block (GPTQ);
    otherwise all groups of a block are measured at once and compressed last to first, so that a producer is still dense
    when a scale is folded into it (AWQ, SmoothQuant).
    """

    needs: Need
    sequential: bool

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise `UnsupportedHardware`, naming a recipe that works, where this machine cannot run the format."""

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        """One layer per projection, in order. Raise `CompressionError` naming a layer whose numbers cannot be used."""
        ...

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        """The same layer without values."""
        ...
