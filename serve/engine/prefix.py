"""Names for the beginnings of texts: one key per full KV block, over all tokens up to the block's end.

Two sequences with the same key have the same tokens there, in the same order from position 0, and came from callers who
may see each other's speed: the chain begins with the request's `cache_salt`, since whoever can time an answer can tell
whether its beginning was computed before (CVE-2025-46570). Keys are 128-bit BLAKE2b, so texts cannot be made to collide
(CVE-2025-25183).
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from serve.engine.sequence import Sequence

__all__ = ["block_keys"]


def block_keys(sequence: Sequence, block_size: int, num_blocks: int) -> list[bytes]:
    """The keys of the first `num_blocks` blocks, each full. Kept with the sequence: a block is hashed once."""
    keys = sequence.block_keys
    while len(keys) < num_blocks:
        start = len(keys) * block_size
        tokens = sequence.tokens[start : start + block_size]
        assert len(tokens) == block_size, "only full blocks have a key"
        before = keys[-1] if keys else _digest(sequence.cache_salt.encode())
        keys.append(_digest(before + array("q", tokens).tobytes()))
    return keys[:num_blocks]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
