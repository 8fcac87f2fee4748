"""`halftone serve` at the terminal: what is being loaded, the table of what came of it, and an orderly end.

The first Ctrl-C or SIGTERM lets open answers finish, the second ends at once; either way no process stays behind.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from serve.config import Config
from serve.errors import SetupError
from serve.heartbeat import VariantState, View
from serve.local import LocalServer

__all__ = ["run"]

_DRAIN_S = 30.0
_EMBEDDED = "builtin:storyteller"


class _Stopped(BaseException):
    """A signal that came while the server was still starting."""


class _Stop(threading.Event):
    """Set by SIGINT and SIGTERM; while `interrupts` it also breaks off what the main thread does."""

    interrupts = True

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.set()
        if self.interrupts:
            raise _Stopped


def run(config: Config, *, host: str, port: int, as_json: bool = False) -> None:
    """Serve until a signal comes. Raises SetupError where nothing can be served."""
    console = Console(stderr=as_json, highlight=False)
    server = LocalServer(_with_local_source(config), host=host, port=port)
    with _signals() as stop:
        try:
            with _Loading(config, console) as loading:
                server.start(loading.show)
            rows = server.variants()
            _require_one(rows)
            _show(config, rows, server.url, console, as_json=as_json)
            stop.interrupts = False
            stop.wait()
            console.print("Stopping: open answers may finish; Ctrl-C again ends them")
            _drain(server, stop)
        except _Stopped:
            console.print("Stopping")
        finally:
            stop.interrupts = False
            server.stop()


def _drain(server: LocalServer, stop: _Stop) -> None:
    stop.clear()
    drained = threading.Thread(target=server.drain, args=(_DRAIN_S,), daemon=True)
    drained.start()
    while drained.is_alive() and not stop.is_set():
        drained.join(0.1)


@contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _with_local_source(config: Config) -> Config:
    """A Hub id is fetched here, once and with its progress shown, and not by every replica."""
    elsewhere = {v.source for v in config.variants if v.source != _EMBEDDED and not Path(v.source).is_dir()}
    if not elsewhere:
        return config
    from serve.compression.source import find_source

    folders = {source: str(find_source(source)) for source in elsewhere}
    return replace(config, variants=tuple(replace(v, source=folders.get(v.source, v.source)) for v in config.variants))


class _Loading:
    """Progress by variant: bars on a terminal, a line for each that is done elsewhere."""

    def __init__(self, config: Config, console: Console) -> None:
        self._console = console
        self._settled: set[str] = set()
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[stage]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {v.name: self._bars.add_task(v.name, total=1.0, stage="starting") for v in config.variants}
        console.print(f"Loading [bold]{escape(config.model_name)}[/]: {', '.join(self._tasks)}")

    def __enter__(self) -> _Loading:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, view: View) -> None:
        for state in view.variants:
            self._bars.update(self._tasks[state.name], completed=_done(state), stage=_stage(state))
            if state.state != "loading" and state.name not in self._settled:
                self._settled.add(state.name)
                if not self._console.is_terminal:
                    self._console.print(f"{state.name}: {state.state}")


def _done(state: VariantState) -> float:
    return 1.0 if state.state != "loading" else 0.95 * state.progress


def _stage(state: VariantState) -> str:
    return state.stage if state.state == "loading" else state.state


def _require_one(rows: Sequence[Mapping[str, Any]]) -> None:
    reasons = list(dict.fromkeys(str(row["reason"]) for row in rows if row["state"] == "failed"))
    if rows and all(row["state"] == "failed" for row in rows):
        raise SetupError("no variant could be loaded: " + "; ".join(reasons))


def _show(config: Config, rows: Sequence[Mapping[str, Any]], url: str, console: Console, *, as_json: bool) -> None:
    paths = {"dashboard": "/dashboard", "api": "/v1", "metrics": "/metrics", "docs": "/openapi.json"}
    urls = {name: url + path for name, path in paths.items()}
    if as_json:
        json.dump({"model": config.model_name, "urls": urls, "variants": [_row(row) for row in rows]}, sys.stdout)
        sys.stdout.write("\n")
        sys.stdout.flush()
        return
    console.print(_table(rows))
    for row in rows:
        if row["state"] == "failed":
            console.print(f"[yellow]{row['name']} is not served:[/] {escape(str(row['reason']))}")
    for name, address in urls.items():
        console.print(f"{name:9} {address}")
    body = json.dumps({"model": config.model_name, "prompt": "Once upon a time", "max_tokens": 60})
    asked = f"curl {url}/v1/completions -H 'content-type: application/json' -d '{body}'"
    console.print(f"try it    {asked}", soft_wrap=True)
    console.print("Ctrl-C stops")


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    report = row["load_report"] or {}
    return {
        "variant": row["name"],
        "precision": row["precision"],
        "state": row["state"],
        "reason": row["reason"],
        "bits_per_weight": report.get("bits_per_weight"),
        "weight_bytes": report.get("total_bytes"),
        "compression_ratio": report.get("compression_ratio"),
        "load_s": report.get("load_s"),
        "path": report.get("path"),
        "weight": row["weight"],
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("variant", "precision", box=None, header_style="bold", pad_edge=False)
    for title in ("bits/weight", "weight bytes", "ratio to 16 bit", "load s", "traffic"):
        table.add_column(title, justify="right")
    table.add_column("path")
    for row in map(_row, rows):
        if row["state"] == "ready":
            table.add_row(
                row["variant"],
                row["precision"],
                f"{row['bits_per_weight']:.2f}",
                f"{row['weight_bytes']:,}",
                f"{row['compression_ratio']:.2f}",
                f"{row['load_s']:.2f}",
                f"{row['weight']:g} %",
                row["path"].partition(" path")[0],
            )
        else:
            table.add_row(row["variant"], row["precision"], "-", "-", "-", "-", row["state"], "-")
    return table
