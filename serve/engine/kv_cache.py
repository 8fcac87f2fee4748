"""The keys and values of all running sequences, in blocks. Knows tensors; which block is whose, `blocks` knows."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KVCache", "LayerShape"]


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
        return self.num_heads * (self.key_size + self.value_size) * self.dtype.itemsize


class KVCache:
    """Per layer two pools of shape [heads, num_blocks + 1, block_size, size]; block 0 stays zero.

    Zero memory is mapped when it is first written, so a large cache costs what is used of it.
    """

    def __init__(self, layers: SequenceOf[LayerShape], num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.keys = [_pool(layer, num_blocks, block_size, layer.key_size) for layer in layers]
        self.values = [_pool(layer, num_blocks, block_size, layer.value_size) for layer in layers]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store new tokens. slots: [N], block * block_size + offset; key, value: [heads, N, size]."""
        for pool, new in ((self.keys[layer], key), (self.values[layer], value)):
            pool.flatten(1, 2).index_copy_(1, slots, new)

    def scrub(self, blocks: SequenceOf[int]) -> None:
        """Zero blocks that may hold NaN: a masked key weighs exactly 0, but 0 * NaN would reach the next owner."""
        for pool in (*self.keys, *self.values):
            pool.index_fill_(1, torch.tensor(blocks, dtype=torch.long, device=pool.device), 0)

    @property
    def bytes(self) -> int:
        return sum(pool.numel() * pool.element_size() for pool in (*self.keys, *self.values))


def _pool(layer: LayerShape, num_blocks: int, block_size: int, size: int) -> Tensor:
    return torch.zeros(layer.num_heads, num_blocks + 1, block_size, size, dtype=layer.dtype, device=layer.device)
