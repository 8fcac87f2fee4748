"""What this process holds: anonymous bytes now, the peak over a stretch of work or of its tensors, and giving back.

Anonymous memory is what the process itself allocated; pages of a memory-mapped checkpoint do not count, for the kernel
may drop them at will. Linux tells them apart; elsewhere the whole resident set stands in.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakMemory", "TensorPeak", "anonymous_bytes", "prompt_release", "release", "watch_peak"]

_STATUS = Path("/proc/self/status")
_INTERVAL_S = 0.01
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them


def anonymous_bytes() -> int:
    """Anonymous resident bytes of this process (all resident bytes where the system does not say)."""
    if not _STATUS.exists():
        return int(psutil.Process().memory_info().rss)
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def release() -> None:
    """Return freed memory to the system: glibc keeps what many small arrays leave behind."""
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)


@contextmanager
def prompt_release() -> Iterator[None]:
    """Large arrays go back to the system the moment they are freed, until the block ends.

    By default glibc raises its threshold with every large array that is freed, and then keeps them for reuse: a gain
    while serving, but a load that converts one matrix after another would hold far more than it needs. The threshold
    takes in what belongs to one matrix too (its scales), which would lie between freed pieces and keep their pages.
    """
    tune = _libc("mallopt")
    if tune is not None:
        tune(_MMAP_THRESHOLD, 64 << 10)
    try:
        yield
    finally:
        if tune is not None:  # where the default ends up
            tune(_MMAP_THRESHOLD, 32 << 20)
            tune(_TRIM_THRESHOLD, 64 << 20)


def _libc(name: str) -> Callable[..., int] | None:
    """One of glibc's own allocator controls; None on other systems and allocators."""
    if sys.platform != "linux":
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function


class PeakMemory:
    """The highest anonymous size seen while watching, less the size at the start; sampled, so brief spikes may hide."""

    def __init__(self) -> None:
        self.start_bytes = anonymous_bytes()
        self._highest = self.start_bytes

    def sample(self) -> None:
        self._highest = max(self._highest, anonymous_bytes())

    @property
    def peak_bytes(self) -> int:
        return self._highest - self.start_bytes


@contextmanager
def watch_peak() -> Iterator[PeakMemory]:
    """Sample the memory every few milliseconds on a thread of its own until the block ends."""
    peak, done = PeakMemory(), threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL_S):
            peak.sample()

    thread = threading.Thread(target=watch, name="peak-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.sample()


_DispatchMode: Any = TorchDispatchMode  # torch leaves it untyped


class TensorPeak(_DispatchMode):  # type: ignore[misc]
    """The most that tensors made meanwhile took at once, exactly; what a kernel takes for itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self._bytes = 0
        self._alive: dict[int, int] = {}  # bytes of each storage by its address, 0 where it was there before

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._note((args, kwargs), made=False)
        result = function(*args, **(kwargs or {}))
        self._note(result, made=True)
        return result

    def _note(self, values: Any, *, made: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes() if made else 0
                    weakref.finalize(storage, self._gone, storage._cdata).atexit = False
                    self._bytes += self._alive[storage._cdata]
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _gone(self, address: int) -> None:
        self._bytes -= self._alive.pop(address)
