"""Runs a function in a process of its own, so that the memory and the time it measures are its own alone.

The process is spawned, not forked: it starts with nothing of its parent's, and ends when the work does. What the work
raises on purpose is raised here again; a process that dies without a word (out of memory) becomes a `SetupError`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, Concatenate, ParamSpec, TypeVar

from serve.errors import HalftoneError, SetupError

__all__ = ["Progress", "run"]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, of how much)."""

P = ParamSpec("P")
T = TypeVar("T")


def run(progress: Progress, work: Callable[Concatenate[Progress, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work(progress, *args, **kwargs)` elsewhere. Call it from the main thread; Ctrl-C ends the other process.

    Function, arguments and result cross over pickled. A result made of plain types keeps this process light.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, work, args, kwargs), daemon=True)
    try:
        with _interrupts_held(), _program_hidden():
            process.start()
        theirs.close()
        kind, found = _listen(ours, progress)
    except EOFError:
        process.join()
        raise SetupError(f"the process that {_purpose(work)} {_cause(process.exitcode or 0)}") from None
    finally:
        if process.pid is not None:
            process.terminate()
            process.join()
        ours.close()
    if kind == "raised":
        raise found
    result: T = found
    return result


def _listen(pipe: Connection, progress: Progress) -> tuple[str, Any]:
    while True:
        kind, found = pipe.recv()
        if kind != "progress":
            return kind, found
        progress(*found)


def _child(pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        pipe.send(("returned", work(lambda *state: pipe.send(("progress", state)), *args, **kwargs)))
    except HalftoneError as error:
        pipe.send(("raised", error))
    except BrokenPipeError:  # nobody waits for the result any more
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
        sys.exit(1)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A process started meanwhile never hears Ctrl-C, which the terminal sends to all: its parent ends it.

    Blocked rather than ignored, so that one that comes in this moment reaches the parent right after.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it now, and it unblocks what is blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _program_hidden() -> Iterator[None]:
    """A process started meanwhile does not import the parent's program, here a whole command line, before its work."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _purpose(work: Callable[..., Any]) -> str:
    return f"ran {work.__name__}"


def _cause(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "was killed; the system does so when memory runs out"
    if exit_code < 0:
        return f"died of {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}; its own message stands above"
