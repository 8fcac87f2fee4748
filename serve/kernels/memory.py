"""Memory for packed weights, on huge pages where the system gives them.

A step reads every weight once, front to back. On pages of 4 KiB the processor's table walks cost a fifth of that; on
pages of 2 MiB nothing. Linux gives them to whoever asks (`transparent_hugepage` set to `madvise` or `always`), but only
for whole, aligned stretches, so many weights share one mapping.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["allocate", "release"]

_MAPPING_BYTES = 64 * 2**20
_LINE_BYTES = 64
_MAPPINGS = Path("/proc/self/smaps")
_CHECKPOINT = ".safetensors"


class _Arena:
    """Hands out pieces of the newest mapping. A mapping lives as long as any tensor in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapping = mmap.mmap(-1, mmap.PAGESIZE)
        self._used = mmap.PAGESIZE

    def take(self, size: int) -> Tensor:
        with self._lock:
            if self._used + size > len(self._mapping):
                self._mapping = _mapped(max(_MAPPING_BYTES, size))
                self._used = 0
            offset = self._used
            self._used += -(-size // _LINE_BYTES) * _LINE_BYTES
            return torch.frombuffer(self._mapping, dtype=torch.uint8, count=size, offset=offset)


def allocate(size: int) -> Tensor:
    """`size` zero bytes, uint8 `[size]`, aligned to a cache line."""
    return _arena.take(size) if size else torch.empty(0, dtype=torch.uint8)


def release() -> None:
    """Once weights are packed, let go of what they were read from: freed heap, and clean pages of mapped checkpoints.

    Such a page comes back from the file when it is read again, so what still points there stays valid. Linux only.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for start, size in _clean_checkpoints():
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _clean_checkpoints() -> Iterator[tuple[int, int]]:
    """Address and size of each mapping of a checkpoint that nobody has written to."""
    start = size = 0
    for line in _MAPPINGS.read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(head[1], 16), int(head[2], 16)
            size = end - start if line.endswith(_CHECKPOINT) else 0
        elif size and line.startswith("Private_Dirty:") and int(line.split()[1]) == 0:
            yield start, size


def _mapped(size: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            return mapping
    return mapping


_arena = _Arena()
