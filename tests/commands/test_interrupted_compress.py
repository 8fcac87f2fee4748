"""A compression that is stopped amid its layers goes on from the finished ones, to the very same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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


def stopped(tiny: str, recipe: str, text: Path, out: Path, number: signal.Signals) -> Path:
    """A finished layer of an attempt that was stopped by a signal before its last."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serve", "compress", tiny, "--recipe", recipe, "--out", str(out),
         "--calibration", str(text), "--num-samples", "8", "--device", "cpu"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (found := list(out.parent.glob(".partial-*/model.layers.0.safetensors.json"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=100)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert ("goes on from there" in told) == (number == signal.SIGINT)
    assert not found[0].with_name("model.layers.1.safetensors.json").exists()
    return found[0].with_suffix("")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gptq4", "mixed4.5"])
def test_a_stopped_compression_goes_on_to_the_same_bytes(tiny: str, recipe: str, text: Path, tmp_path: Path) -> None:
    number = {"gptq4": signal.SIGKILL, "mixed4.5": signal.SIGINT}[recipe]
    made = stopped(tiny, recipe, text, tmp_path / "out", number).stat().st_mtime_ns
    resumed = whole(tiny, recipe, text, tmp_path / "out")
    assert (tmp_path / "out" / "model.layers.0.safetensors").stat().st_mtime_ns == made
    assert resumed == whole(tiny, recipe, text, tmp_path / "whole")


def test_what_another_recipe_began_is_never_taken_over(tiny: str, text: Path, tmp_path: Path) -> None:
    other = tmp_path / ".partial-out-01234567"
    other.mkdir()
    whole(tiny, "int8", text, tmp_path / "out")
    assert not other.exists()
