"""Several measurements in one command: a failure or Ctrl-C never costs what was measured before."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import typer
from rich.console import Console

from serve.errors import SetupError

__all__ = ["Attempts"]

_INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended."""


@dataclass
class Attempts:
    """Why each recipe that failed did, and whether somebody interrupted. `finish` says so, after the results."""

    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """A measurement whose failure is noted, for others may still succeed."""
        try:
            yield
        except SetupError as error:
            self.failed[name] = error.message

    @contextmanager
    def all(self, console: Console) -> Iterator[None]:
        """All measurements: Ctrl-C or SIGTERM ends them, and what follows prints what there is."""
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True
            console.print("Interrupted: what follows was measured before")
        finally:
            signal.signal(signal.SIGTERM, before)

    def finish(self) -> None:
        """Raise what went wrong, now that everything that went well is printed."""
        if self.interrupted:
            raise typer.Exit(_INTERRUPTED)
        if self.failed:
            reasons = (text if text.startswith(name) else f"{name}: {text}" for name, text in self.failed.items())
            raise SetupError("; ".join(reasons))
