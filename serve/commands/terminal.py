"""What the commands share at the terminal: consoles, bars on long work, and JSON alone on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

__all__ = ["Steps", "print_json", "size", "standard_error", "standard_output"]

_WIDE = 200


def standard_output() -> Console:
    """For tables. A pipe has no width: nothing is cut there."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)


def standard_error() -> Console:
    """For progress and remarks, so that output can be piped."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """One document on standard output."""
    json.dump(data, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def size(count_bytes: float) -> str:
    """For a person: 7.48 MB, 14.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.3g} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.3g} TB"


_LONGEST_LAYER_S = 1800.0  # by default what took more than half a minute counts for nothing, and no time left is shown


class Steps:
    """Named steps of long work: a bar for the one at hand on a terminal, elsewhere a line for each that is done."""

    def __init__(self, total: int, console: Console) -> None:
        self._total, self._done, self._console = total, 0, console

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[str, int, int], None]]:
        self._done += 1
        label = f"{self._done}/{self._total} {name}" if self._total > 1 else name
        bars = Bars(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24),
            TextColumn("{task.fields[stage]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self._console, transient=True, disable=not self._console.is_terminal,
            speed_estimate_period=_LONGEST_LAYER_S,
        )  # fmt: skip
        task, shown = bars.add_task(label, total=None, stage="starting"), "starting"

        def tell(stage: str, done: int, total: int) -> None:
            nonlocal shown
            if stage != shown:  # whose layers take another time, so that what is left is estimated anew
                bars.reset(task, total=total or None)
                shown = stage
            bars.update(task, stage=stage, completed=done, total=total or None)

        end = "not finished"
        try:
            with bars:
                yield tell
            end = "done"
        finally:
            self._console.print(f"{label}: {end}", markup=False)
