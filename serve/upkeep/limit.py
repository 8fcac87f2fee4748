"""How much memory a replica may use, and how much of that is left: of its GPU, else of the machine within the limit of
its container (cgroup v2, or v1), which ends a process that goes beyond it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

__all__ = ["Limit", "limit_of"]

_GROUP: Final = Path("/sys/fs/cgroup")
_FILES: Final = (  # limit, in use, and where the page cache that may be dropped stands
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


@dataclass(frozen=True)
class Limit:
    """All that may be used, by whomever, and what of it is free."""

    total_bytes: int
    available_bytes: int

    @property
    def used_ratio(self) -> float:
        return 1.0 - self.available_bytes / self.total_bytes if self.total_bytes else 0.0


def limit_of(device: str, group: Path = _GROUP) -> Limit:
    """Whichever is tighter now: the machine or the container."""
    if device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return Limit(int(total), int(free))
    machine = psutil.virtual_memory()
    limits = [Limit(int(machine.total), int(machine.available))]
    for limit, used, stat, droppable in _FILES:
        with suppress(OSError, ValueError):  # no such file; no limit reads "max"
            allowed = int((group / limit).read_text())
            if allowed >= machine.total:  # v1 writes a huge number where there is no limit
                continue
            counts = dict(line.split() for line in (group / stat).read_text().splitlines())
            taken = int((group / used).read_text()) - int(counts.get(droppable, 0))
            limits.append(Limit(allowed, min(allowed, max(0, allowed - taken))))
    return min(limits, key=lambda each: each.available_bytes)
