"""A server as a user starts it: `halftone serve` in its own process, known only by what it prints and answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from random import SystemRandom
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """Below those that the system deals out by itself: Ray would be given it before the server has bound it."""
    while True:
        port = SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Halftone:
    """`with Halftone("config.yaml") as server:` runs from ready to gone. `announced` is what `--json` printed.

    state: where it remembers rollouts; None is a folder of its own that ends with it.
    """

    def __init__(
        self, *arguments: str, port: int | None = None, ready_s: float = 180.0, state: Path | None = None
    ) -> None:
        self._state = tempfile.TemporaryDirectory(prefix="halftone-state-")
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "serve", "serve", *arguments, "--port", str(self.port), "--json"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", ""),
            "HALFTONE_STATE": str(state or self._state.name),
        }
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={name: value for name, value in environment.items() if value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._ready_s = ready_s
        self.announced: dict[str, Any] = {}

    def __enter__(self) -> Halftone:
        assert self.process.stdout is not None
        watchdog = threading.Timer(self._ready_s, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        if not line:
            self.stop()
            raise AssertionError(f"the server did not become ready; it said: {self.said}")
        self.announced = json.loads(line)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def said(self) -> str:
        """Its standard error so far."""
        return "".join(self._said)

    def family(self) -> list[psutil.Process]:
        """Every process that it started."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def worker(self, name: str) -> psutil.Process:
        """The Serve replica of one deployment."""
        found = [process for process in self.family() if f":{name}" in "".join(process.cmdline())]
        assert len(found) == 1, f"{name}: {[process.cmdline() for process in self.family()]}"
        return found[0]

    def stop(self, how: signal.Signals = signal.SIGINT, timeout_s: float = 60.0) -> list[psutil.Process]:
        """End it as a terminal (SIGINT, to the whole process group) or a supervisor (SIGTERM, to it alone) would.

        Returns what is still alive of its family afterwards.
        """
        family = self.family()
        if self.process.poll() is None:
            if how == signal.SIGINT:
                os.killpg(self.process.pid, how)
            else:
                self.process.send_signal(how)
        try:
            self.process.wait(timeout_s)
        finally:
            left = [process for process in family if process.is_running()]
            for process in left:
                process.kill()
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            self._listener.join(5.0)
            for pipe in (self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()
            self._state.cleanup()
        return left

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"halftone_{name}" and labels.items() <= sample.labels.items()
        )

    def wait_until(self, condition: Any, timeout_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, "it never came true"
            time.sleep(0.05)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._said.append(line)
