"""What one replica holds, by component, so that the parts add up to what the system says it holds.

    weights_resident + quantization + kv_cache_resident + allocator + runtime = process    on a CPU
                                                                              = device     on a GPU, context included

`weights` and `kv_cache` are what is stored and reserved. A file that is mapped and a cache that is zero are only held
where they were touched: the `_resident` part. `kv_cache_used` is what sequences occupy of the cache now. `runtime` was
there before the model: the interpreter and its libraries, on a GPU the CUDA context. `allocator` is the rest: memory
that was freed and is kept for the next step, gaps between pieces, and small things that have no other name.
`activations` is the most that steps have held on top so far; between steps it is given back, or lies in `allocator`.

The system tells (Linux: /proc), on a GPU torch's allocator and NVML. Where it keeps no peak, the highest moment at
which somebody looked stands in.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from serve.errors import Unmeasurable
from serve.upkeep.gpu import Gpu

__all__ = ["Engaged", "MemoryAccount", "resident_checkpoint_bytes"]

_OWN = Path("/proc/self")
_CHECKPOINT = ".safetensors"


@dataclass(frozen=True)
class Engaged:
    """What is known by name, in bytes. unread: of all weights, what lies in a mapped file and was not touched."""

    weights: int
    quantization: int
    unread: int
    kv_cache: int
    kv_cache_used: int
    kv_cache_resident: int


class _Place(Protocol):
    """Where the model lies."""

    def held_bytes(self) -> int:
        """All that this process holds there now."""

    def peak_bytes(self, *, restart: bool = False) -> int:
        """The most since it was last restarted; restart: from now on anew."""

    def allocator_bytes(self, rest: int) -> int:
        """How much of what has no name the allocator keeps."""


class MemoryAccount:
    """Made before the model is loaded, `stand` once it is, then `components`."""

    def __init__(self, device: str) -> None:
        self._place: _Place = _Cuda(device) if device.startswith("cuda") else _Host()
        self._on_gpu = device.startswith("cuda")
        self._standing = 0
        self._activations = 0

    def stand(self, kv_cache_resident: int) -> None:
        """The model is loaded and has made no step yet: what is held beyond this from now on are activations."""
        self._activations = 0
        self._standing = self._place.peak_bytes(restart=True) - kv_cache_resident

    def components(self, engaged: Engaged) -> dict[str, int]:
        """Bytes now, by component."""
        peak = self._place.peak_bytes() - self._standing - engaged.kv_cache_resident
        self._activations = max(self._activations, peak)
        weights = engaged.weights - engaged.unread
        held = self._place.held_bytes()
        rest = max(0, held - weights - engaged.quantization - engaged.kv_cache_resident)
        allocator = min(rest, self._place.allocator_bytes(rest))
        return {
            "weights": engaged.weights,
            "weights_resident": weights,
            "quantization": engaged.quantization,
            "kv_cache": engaged.kv_cache,
            "kv_cache_used": engaged.kv_cache_used,
            "kv_cache_resident": engaged.kv_cache_resident,
            "activations": self._activations,
            "allocator": allocator,
            "runtime": rest - allocator,
            "process": _resident_bytes() if self._on_gpu else held,
            **({"device": held} if self._on_gpu else {}),
        }


class _Host:
    """A process in the machine's own memory."""

    def __init__(self) -> None:
        self._before = self._highest = _resident_bytes()

    def held_bytes(self) -> int:
        return _resident_bytes()

    def peak_bytes(self, *, restart: bool = False) -> int:
        if restart:
            self._highest = 0
            with suppress(OSError):  # elsewhere than on Linux
                (_OWN / "clear_refs").write_text("5")
        self._highest = max(self._highest, _resident_bytes(), _peak_bytes())
        return self._highest

    def allocator_bytes(self, rest: int) -> int:
        return max(0, rest - self._before)


class _Cuda:
    """A process on a GPU. What it holds beside torch's allocator, NVML alone knows; without it there is no runtime."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._gpu: Gpu | None = None
        with suppress(Unmeasurable):
            self._gpu = Gpu.of(device)

    def held_bytes(self) -> int:
        import torch

        told = self._gpu.held_bytes() if self._gpu else None
        return told or int(torch.cuda.memory_reserved(self._device))

    def peak_bytes(self, *, restart: bool = False) -> int:
        import torch

        if restart:
            torch.cuda.reset_peak_memory_stats(self._device)
        return int(torch.cuda.max_memory_allocated(self._device))

    def allocator_bytes(self, rest: int) -> int:
        import torch

        return int(torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device))


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    """The highest resident size since /proc/self/clear_refs was written to; 0 where the system keeps none."""
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", (_OWN / "status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return 0


def resident_checkpoint_bytes() -> int:
    """What this process has read of the checkpoints and artifacts that it maps. Takes milliseconds."""
    resident, inside = 0, False
    with suppress(OSError):
        for line in (_OWN / "smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = line.endswith(_CHECKPOINT)
            elif inside and line.startswith("Rss:"):
                resident += int(line.split()[1]) * 1024
    return resident
