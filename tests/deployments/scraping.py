"""A real Prometheus with the configuration that comes with the server, pointed at a server of a test."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deployments.queries import PROMETHEUS
from tests.running import free_port


class Prometheus:
    """`with Prometheus(folder, target) as prometheus:` scrapes `target` every second and evaluates all rules."""

    def __init__(self, folder: Path, target: str) -> None:
        program = shutil.which("prometheus")
        if program is None:
            pytest.skip("no Prometheus on this machine (Debian's package prometheus)")
        document = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        document["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        document["rule_files"] = [str(PROMETHEUS / name) for name in document["rule_files"]]
        document["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(document))
        self._url = f"http://127.0.0.1:{free_port()}"
        self._command = [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self._url.removeprefix('http://')}",
        ]

    def __enter__(self) -> Prometheus:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait_until(lambda: self.value('up{job="halftone"}') == 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)

    def query(self, expression: str) -> dict[str, float]:
        """An instant vector by its label `variant`."""
        answer = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=10).raise_for_status()
        samples = answer.json()["data"]["result"]
        return {sample["metric"].get("variant", ""): float(sample["value"][1]) for sample in samples}

    def value(self, expression: str) -> float | None:
        return next(iter(self.query(expression).values()), None)

    def rules(self) -> list[dict[str, Any]]:
        """As evaluated: `name`, `health`, `lastError`."""
        groups = httpx.get(f"{self._url}/api/v1/rules", timeout=10).raise_for_status().json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            try:
                if condition():
                    return
            except httpx.HTTPError:
                assert self._process.poll() is None, "Prometheus ended"
            time.sleep(0.1)
        raise AssertionError("it never came true")
