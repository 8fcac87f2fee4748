"""The keys and values of all running sequences, in blocks. Knows tensors; which block is whose, `blocks` knows.

Stored in the model's own type, or in 8 bits: then each token's vector of each head has a scale of its own, its largest
magnitude over 127, so that what one token stores never depends on another, and twice as many tokens fit.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from serve.engine.memory import lazy_zeros, resident_bytes

__all__ = ["KVCache", "LayerShape", "Pool"]

_LARGEST = 127


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps per token. Layers may differ (sliding and full layers of one model do)."""

    num_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        scales_bytes = 2 * torch.float32.itemsize if self.dtype is torch.int8 else 0
        return self.num_heads * ((self.key_size + self.value_size) * self.dtype.itemsize + scales_bytes)

    def in_int8(self) -> LayerShape:
        return replace(self, dtype=torch.int8)


class Pool:
    """One layer's keys, or its values. `data`: [heads, num_blocks + 1, block_size, size]; block 0 stays zero.

    `scales`: float32 [heads, num_blocks + 1, block_size], only where `data` is int8.
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data
        is_int8 = data.dtype is torch.int8
        self.scales = lazy_zeros(data.shape[:3], torch.float32, data.device) if is_int8 else None

    @property
    def num_heads(self) -> int:
        return self.data.shape[0]

    @property
    def size(self) -> int:
        return self.data.shape[-1]

    @property
    def bytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def write(self, slots: Tensor, new: Tensor) -> None:
        """Store new tokens. slots: [N], block * block_size + offset; new: [heads, N, size]."""
        if self.scales is not None:
            scales = new.float().abs().amax(-1) / _LARGEST
            self.scales.flatten(1, 2).index_copy_(1, slots, scales)
            # A vector of zeros has the scale 0; what is not finite keeps a scale that is not, and is found out later.
            new = (new.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round().to(torch.int8)
        self.data.flatten(1, 2).index_copy_(1, slots, new)

    def gather(self, blocks: Tensor) -> Tensor:
        """blocks: [B]. Returns fp32 [heads, B * block_size, size]."""
        picked = self.data.index_select(1, blocks).float()
        if self.scales is not None:
            picked *= self.scales.index_select(1, blocks)[..., None]
        return picked.flatten(1, 2)

    def scrub(self, blocks: Tensor) -> None:
        self.data.index_fill_(1, blocks, 0)
        if self.scales is not None:
            self.scales.index_fill_(1, blocks, 0)


class KVCache:
    """Two pools per layer. Zero memory is mapped when first written, so a large cache costs what is used of it."""

    def __init__(self, layers: SequenceOf[LayerShape], num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.keys = [_pool(layer, num_blocks, block_size, layer.key_size) for layer in layers]
        self.values = [_pool(layer, num_blocks, block_size, layer.value_size) for layer in layers]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store new tokens. slots: [N], block * block_size + offset; key, value: [heads, N, size]."""
        self.keys[layer].write(slots, key)
        self.values[layer].write(slots, value)

    def scrub(self, blocks: SequenceOf[int]) -> None:
        """Zero blocks that may hold NaN: a masked key weighs exactly 0, but 0 * NaN would reach the next owner."""
        for pool in (*self.keys, *self.values):
            pool.scrub(torch.tensor(blocks, dtype=torch.long, device=pool.data.device))

    @property
    def bytes(self) -> int:
        return sum(pool.bytes for pool in (*self.keys, *self.values))

    def resident_bytes(self) -> int:
        """What of it was written to, and is held."""
        pools = (*self.keys, *self.values)
        return resident_bytes(tensor for pool in pools for tensor in (pool.data, pool.scales) if tensor is not None)


def _pool(layer: LayerShape, num_blocks: int, block_size: int, size: int) -> Pool:
    shape = (layer.num_heads, num_blocks + 1, block_size, size)
    return Pool(lazy_zeros(shape, layer.dtype, layer.device))
