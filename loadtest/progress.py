"""A run as it goes by, on standard error: a live table in a terminal, a line now and then anywhere else."""

import time
from collections import Counter, deque
from statistics import median
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest.frames import Health
from loadtest.record import Record
from loadtest.settings import Load

LINE_EVERY_S = 10.0
RECENT_S = 5.0


class Progress:
    """Counts what goes by; a context manager, because a live display must be put away again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._drawn_s = 0.0
        self._stages = 0
        self._reset(Load())

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, load: Load) -> None:
        self._stages += 1
        self._reset(load)
        self._draw()

    def record(self, record: Record) -> None:
        self._outcomes["warm-up" if record.warmup else record.error or "ok"] += 1
        self._recent.append((record.end_s, record))
        self._draw_sometimes()

    def health(self, health: Health) -> None:
        self._health[health.process] = health
        self._draw_sometimes()

    def _reset(self, load: Load) -> None:
        self._load = load
        self._began_s = time.monotonic()
        self._outcomes: Counter[str] = Counter()
        self._health: dict[int, Health] = {}
        self._recent: deque[tuple[float, Record]] = deque(maxlen=2000)

    def _draw_sometimes(self) -> None:
        wait_s = 0.25 if self._live is not None else LINE_EVERY_S
        if time.monotonic() - self._drawn_s >= wait_s:
            self._draw()

    def _draw(self) -> None:
        self._drawn_s = time.monotonic()
        cells = self._cells()
        if self._live is None:
            self._console.print(" · ".join(f"{name} {value}" for name, value in cells.items()), highlight=False)
            return
        table = Table(*cells, title=f"stage {self._stages}: {_offer(self._load)}")
        table.add_row(*cells.values())
        self._live.update(table, refresh=True)

    def _cells(self) -> dict[str, str]:
        elapsed_s = time.monotonic() - self._began_s
        recent = [record for end_s, record in self._recent if end_s > elapsed_s - RECENT_S and record.ok]
        span_s = max(min(elapsed_s, RECENT_S), 1e-6)
        return {
            "time": f"{elapsed_s:.0f} s" + (f" of {self._load.total_s:.0f}" if self._load.total_s else ""),
            "sent": str(sum(health.sent for health in self._health.values())),
            "in flight": str(sum(health.in_flight for health in self._health.values())),
            "done": _of(sum(self._outcomes.values()), self._load.total_requests),
            "requests/s": f"{len(recent) / span_s:.1f}",
            "tokens/s": f"{sum(record.tokens for record in recent) / span_s:.0f}",
            "TTFT p50": _milliseconds([record.ttft_s for record in recent]),
            "E2E p50": _milliseconds([record.e2e_s for record in recent]),
            "outcomes": ", ".join(f"{name} {count}" for name, count in self._outcomes.most_common()) or "–",
        }


class Silence:
    """Watches a run and says nothing."""

    def stage(self, load: Load) -> None: ...
    def record(self, record: Record) -> None: ...
    def health(self, health: Health) -> None: ...


def _of(count: int, total: int | None) -> str:
    return str(count) if total is None else f"{count} of {total}"


def _offer(load: Load) -> str:
    offered = load.describe()
    return ", ".join(f"{name} {value}" for name, value in offered.items())


def _milliseconds(values_s: list[float | None]) -> str:
    known = [value for value in values_s if value is not None]
    return f"{median(known) * 1e3:.0f} ms" if known else "–"
