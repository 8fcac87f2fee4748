"""The contract of every number format: a linear layer that says what it stores, with plain arithmetic beside it.

A layer lives in two layouts. The **plain** one is what `state_dict` holds and an artifact saves: the same on every
machine. `prepare` turns it, once, into whatever this machine's kernel wants and releases the plain copy, so that no
weight is held twice. Layers know nothing about how their values were chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from serve.errors import ArtifactError
from serve.kernels import PackedLinear, unavailable

__all__ = ["CompressedLinear", "LinearSpec", "Storage", "tiled_product"]

_TILE_ROWS = 256


@dataclass(frozen=True)
class LinearSpec:
    """A projection as the model's configuration has it: enough to build an empty layer. `dtype` is the activations'."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """Bytes of one layer: the `weight_bytes` proper, and the scales, zero points and tables that decoding needs."""

    weight_bytes: int
    metadata_bytes: int
    bias_bytes: int = 0


class CompressedLinear(nn.Module, ABC):
    """`y = x W^T + b` for `x [..., in_features]`, with W in some format. Built empty; `fill` gives it its tensors."""

    metadata: ClassVar[tuple[str, ...]] = ()
    bias: Tensor | None
    packed: PackedLinear | None = None
    """The weights as `serve.kernels` reads them, where this machine has the kernels and the format such a form."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.prepared = False
        if spec.has_bias:
            self.declare("bias", (spec.out_features,), spec.dtype)
        else:
            self.register_buffer("bias", None)

    def declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Announce a tensor of the plain layout, without memory."""
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))

    def fill(self, **tensors: Tensor | None) -> None:
        """Give every declared tensor its values; raise `ArtifactError` where one is missing or of another form."""
        for name, declared in self.named_buffers():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != declared.shape or tensor.dtype != declared.dtype:
                found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise ArtifactError(
                    f"{self.spec.name}.{name}: expected {declared.dtype} {list(declared.shape)}, found {found}"
                )
            setattr(self, name, tensor)

    def prepare(self) -> None:
        """Move to the layout that this machine multiplies in. Idempotent; the plain tensors are gone afterwards."""
        if not self.prepared:
            self._prepare()
            self.prepared = True

    def _prepare(self) -> None:
        return None

    @property
    def packable(self) -> bool:
        """Whether the kernels of this machine could multiply the layer; `_prepare` then fills `packed`."""
        on_cpu = all(buffer.device.type == "cpu" for buffer in self.buffers())
        return on_cpu and self.spec.dtype is torch.bfloat16 and unavailable() is None

    def multiply_packed(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """`forward` by the kernels, for bf16 activations."""
        return packed(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def storage(self) -> Storage:
        """Exact bytes of the plain layout."""
        sizes = {name: buffer.nbytes for name, buffer in self.named_buffers()}
        bias = sizes.pop("bias", 0)
        metadata = sum(size for name, size in sizes.items() if name in self.metadata)
        return Storage(sum(sizes.values()) - metadata, metadata, bias)

    @property
    @abstractmethod
    def kernel(self) -> str:
        """Which path multiplies this layer on this machine, for reports."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]` in x's dtype."""

    @abstractmethod
    def reference(self, x: Tensor) -> Tensor:
        """The same product by plain arithmetic on the plain layout: slow, for tests and odd machines."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight as float32 `[out_features, in_features]`, from the plain layout. For reference code only."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def tiled_product(x: Tensor, out_features: int, tile: Callable[[slice], Tensor]) -> Tensor:
    """`x [tokens, in] @ W^T` where `tile(rows)` decodes those rows of W into x's dtype `[rows, in]`.

    Only one tile is ever decoded, small enough to stay in the processor's cache: no dense copy of W exists.
    """
    y = x.new_empty(x.shape[0], out_features)
    for start in range(0, out_features, _TILE_ROWS):
        rows = slice(start, min(start + _TILE_ROWS, out_features))
        y[:, rows] = F.linear(x, tile(rows))
    return y
