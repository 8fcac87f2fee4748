import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class FakeServer:
    """The fake server's address, and what it says it did."""

    url: str

    def truth(self, run: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/truth?run={run}") as answer:
            return json.load(answer)


@dataclass(frozen=True)
class Outcome:
    """A finished `python -m loadtest ...`."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self.stdout)


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., int]]:
    """Starts fake servers; each ends when its standard input closes."""
    started = []

    def start(*arguments: str) -> int:
        command = [sys.executable, str(HERE / "fake_server.py"), *arguments]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(server)
        assert server.stdout is not None
        return int(server.stdout.readline())

    yield start
    for server in started:
        server.communicate(timeout=10)


@pytest.fixture(scope="session")
def server(start_server: Callable[..., int]) -> FakeServer:
    return FakeServer(f"http://127.0.0.1:{start_server()}")


@pytest.fixture
def loadtest() -> Callable[..., Outcome]:
    """Runs the command line to its end."""

    def run(*arguments: object, timeout_s: float = 60) -> Outcome:
        command = [sys.executable, "-m", "loadtest", *(str(argument) for argument in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def measure(server: FakeServer, loadtest: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """`loadtest run` against the fake server, told by `fake` how to behave."""

    def run(fake: dict[str, Any], *arguments: object) -> Outcome:
        where = ("--url", server.url, "--model", "fake", "--json", "--quiet")
        return loadtest("run", *where, "--extra-body", json.dumps({"fake": fake}), *arguments)

    return run
