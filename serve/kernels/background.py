"""Compiling beside a replica that serves already: at low priority, with an owner who may end it.

Layers are packed for whatever multiplies them when they are loaded, so the kernels must not appear in the middle of a
load: until the owner says `take`, there are none, however long they have been on disk.
"""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

from serve.kernels.build import compiled, end
from serve.kernels.library import must_compile, postpone, unavailable

__all__ = ["BEING_BUILT", "Build", "build_aside"]

BEING_BUILT = "the native path is being built"
_LOWEST_PRIORITY = 19


class Build:
    """One compilation on a thread of its own. `wait` for it, then `take` it; or `cancel`."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False
        self._outcome: Path | str = "the build was ended"
        postpone(BEING_BUILT)
        threading.Thread(target=self._compile, name="halftone-build", daemon=True).start()

    def wait(self) -> None:
        """Block until it is over, in whichever way."""
        self._over.wait()

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def take(self) -> str | None:
        """From now on there are kernels; or why there are none, in one line. Between two loads only."""
        global _running
        assert self._over.is_set()
        postpone(self._outcome if isinstance(self._outcome, str) else None)
        _running = None
        return unavailable()

    def cancel(self) -> None:
        """End the compiler. There are no kernels then, as before."""
        with self._lock:
            self._cancelled = True
            if self._process is not None:
                end(self._process)
        self._over.set()

    def _compile(self) -> None:
        with suppress(OSError):  # of this thread alone, and of what it starts
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            self._outcome = compiled(started=self._started)
        finally:
            self._over.set()

    def _started(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._process = process
            if self._cancelled:
                end(process)


_running: Build | None = None


def build_aside() -> Build | None:
    """Compile the kernels in the background where that is still to be done, else None. Call it before a load only."""
    global _running
    if _running is not None and _running.is_over:
        _running.take()
    if _running is None and must_compile():
        _running = Build()
    return _running
