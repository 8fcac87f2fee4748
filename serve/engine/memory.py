"""How much memory a device has left, zeros that take none until they are written, and what a tensor really takes."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

__all__ = ["free_bytes", "is_out_of_memory", "lazy_zeros", "resident_bytes"]

_PAGEMAP = Path("/proc/self/pagemap")
_PAGES_AT_ONCE = 1 << 18


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU each page of them is only mapped when it is written to (`torch.zeros` writes them all)."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).view(dtype).view(*shape)


def is_out_of_memory(error: Exception) -> bool:
    """On a CPU torch raises a RuntimeError like any other, known by its words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """What `tensors` hold: on a CPU the pages that were touched, for zero memory is only mapped when it is written to.
    All of it on a GPU, and where the system does not tell (only Linux does)."""
    return sum(_resident_bytes(tensor) for tensor in tensors)


def _resident_bytes(tensor: Tensor) -> int:
    if tensor.device.type != "cpu" or not tensor.nbytes:
        return tensor.nbytes
    first = tensor.data_ptr() // mmap.PAGESIZE
    pages = -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE) - first
    try:
        present = sum(_present(first + at, min(_PAGES_AT_ONCE, pages - at)) for at in range(0, pages, _PAGES_AT_ONCE))
    except OSError:
        return tensor.nbytes
    return min(present * mmap.PAGESIZE, tensor.nbytes)


def _present(first: int, pages: int) -> int:
    """How many of `pages` pages from `first` on are in memory: bit 63 of a page's entry."""
    entries = np.fromfile(_PAGEMAP, np.uint64, pages, offset=first * 8)
    return int(np.count_nonzero(entries >> np.uint64(63)))
