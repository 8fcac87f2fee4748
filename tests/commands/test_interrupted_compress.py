"""A compression that is stopped amid its layers goes on from the finished ones, to the very same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serve.compression.calibration import Calibration
from serve.compression.recipe import Recipe
from serve.saving import compress_to

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tiny(shared: Path) -> str:
    return str(shared / "models" / "TinyStories-656K")


@pytest.fixture
def text(shared: Path) -> Path:
    return shared / "data" / "tinystories" / "calib.jsonl"


def whole(tiny: str, recipe: str, text: Path, out: Path) -> dict[str, bytes]:
    compress_to(tiny, Recipe.parse(recipe), out, calibration=Calibration(text, num_samples=8), device="cpu")
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


STOPPED = """
import os, sys
from serve.cli import main
from serve.compression.artifact import Draft

number, write = int(sys.argv.pop()), Draft.write

def write_and_stop(self, part, tensors):
    write(self, part, tensors)
    if part == "model.layers.0":
        os.kill(os.getpid(), number)

Draft.write = write_and_stop
main()
"""


def stopped(tiny: str, recipe: str, text: Path, out: Path, number: signal.Signals) -> Path:
    """The first layer of an attempt that a signal stopped as soon as that was finished."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, "compress", tiny, "--recipe", recipe, "--out", str(out),
         "--calibration", str(text), "--num-samples", "8", "--device", "cpu", str(int(number))],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
    assert ("goes on from there" in done.stderr) == (number == signal.SIGINT)
    (found,) = out.parent.glob(".partial-out-*/model.layers.0.safetensors")
    assert not found.with_name("model.layers.1.safetensors").exists()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "number"), [("gptq4", signal.SIGKILL), ("wanda50+awq4", signal.SIGINT)])
def test_a_stopped_compression_goes_on_to_the_same_bytes(
    tiny: str, recipe: str, number: signal.Signals, text: Path, tmp_path: Path
) -> None:
    made = stopped(tiny, recipe, text, tmp_path / "out", number).stat().st_mtime_ns
    resumed = whole(tiny, recipe, text, tmp_path / "out")
    assert (tmp_path / "out" / "model.layers.0.safetensors").stat().st_mtime_ns == made
    assert resumed == whole(tiny, recipe, text, tmp_path / "whole")


def test_what_another_recipe_began_is_never_taken_over(tiny: str, text: Path, tmp_path: Path) -> None:
    other = tmp_path / ".partial-out-01234567"
    other.mkdir()
    whole(tiny, "int8", text, tmp_path / "out")
    assert not other.exists()
