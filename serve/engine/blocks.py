"""Which KV blocks are free, whose they are, and which hold a prefix that others may read. Pure bookkeeping: the pool
knows block numbers, not what lies in them.

A full block that a sequence has computed can be *registered* under a key that names everything before its end (see
`prefix`). Sequences that begin alike then share it instead of computing it again, as in vLLM's automatic prefix
caching (arXiv 2309.06180). A registered block never changes. Once nobody uses it, it waits, still readable, until its
memory is needed: the least recently used goes first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

__all__ = ["NULL_BLOCK", "BlockPool", "blocks_for"]

NULL_BLOCK = 0
"""Never allocated, always zero: what the padding of a block table points to."""


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks hold `tokens` tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """Block numbers 1 .. `num_blocks`, each either free or used by one or more sequences."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blank = list(range(num_blocks, NULL_BLOCK, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # free but registered, least recently used first
        self._users: Counter[int] = Counter()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for one user, which the caller has checked to be free."""
        assert count <= self.num_free, "asked for more blocks than are free"
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        self._users.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> list[int]:
        """One user less for each; returns those that hold nothing that can be read again, and are blank now.

        The last that became blank are the first reused, because they are still in the processor's cache. Of kept ones
        the end of a text is given up before its beginning, without which nobody could find it.
        """
        blank = []
        for block in reversed(list(blocks)):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            if block in self._key_of:
                self._kept[block] = None
            else:
                blank.append(block)
        self._blank += blank
        return blank

    def num_freed_by(self, owners: Iterable[list[int]]) -> int:
        """How many blocks would be free if all of these users gave theirs back."""
        given = Counter(block for blocks in owners for block in blocks)
        return sum(count == self._users[block] for block, count in given.items())

    def register(self, block: int, key: bytes) -> None:
        """A used block is full and will not change: others may read it under `key`. The first under a key stays."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The registered blocks of the longest prefix that is there."""
        found: list[int] = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """One user more for each of these registered blocks."""
        for block in blocks:
            self._users[block] += 1
            self._kept.pop(block, None)

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
