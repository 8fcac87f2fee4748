"""The command line before anything heavy starts: help, one line for a mistake, and a light import."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def halftone(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_help_names_the_commands() -> None:
    done = halftone("--help")
    assert done.returncode == 0
    assert "serve" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.yaml"], "cannot read none.yaml"),
        (["./no-such-folder"], "no such folder"),
        (["builtin:poet"], "unknown built-in model"),
        (["--recipe", "int9"], "variants[0].recipe: unknown name 'int9'"),
        (["config.yaml", "--recipe", "int8"], "--recipe goes with a model"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_one(arguments: list[str], told: str) -> None:
    done = halftone("serve", *arguments)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_said_before_anything_loads() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = halftone("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "Address already in use; choose another" in done.stderr
    assert done.stderr.count("error:") == 1
