"""Where a process runs, so that a neighbour on the same machine can tell at once that it has died."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

__all__ = ["Place", "has_died", "here"]


@dataclass(frozen=True)
class Place:
    """machine: one boot of one kernel, and the namespace that the process number is counted in."""

    machine: str
    pid: int
    born_s: float


def here() -> Place:
    """This process."""
    return Place(_machine(), os.getpid(), psutil.Process().create_time())


def has_died(place: Place) -> bool:
    """False where it lives, and where it cannot be seen from here: on another machine, in another container."""
    if not place.machine or place.machine != _machine():
        return False
    try:
        process = psutil.Process(place.pid)
        return process.create_time() != place.born_s or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115  the target is no path
    except OSError:  # not Linux
        return ""
