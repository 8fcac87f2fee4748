"""Which KV blocks are free. Pure bookkeeping: the pool knows block numbers, not what lies in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

__all__ = ["NULL_BLOCK", "BlockPool", "blocks_for"]

NULL_BLOCK = 0
"""Never allocated, always zero: what the padding of a block table points to."""


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks hold `tokens` tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """Block numbers 1 .. `num_blocks`, each either free or owned by one sequence."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(NULL_BLOCK + 1, num_blocks + 1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, which the caller has checked to be free."""
        assert count <= len(self._free), "asked for more blocks than are free"
        return [self._free.popleft() for _ in range(count)]

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back; the last freed are the first reused, because they are still in the processor's cache."""
        self._free.extendleft(blocks)
