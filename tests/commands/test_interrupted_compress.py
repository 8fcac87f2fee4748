"""A compression that is stopped amid its layers goes on from the finished ones, to the very same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.compression.artifact import Draft
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

number, step, at = int(sys.argv.pop()), *sys.argv.pop().split(":")
done = getattr(Draft, step)

def do_and_stop(self, name, facts):
    done(self, name, facts)
    if name == at:
        os.kill(os.getpid(), number)

setattr(Draft, step, do_and_stop)
main()
"""


def stopped(tiny: str, recipe: str, text: Path, out: Path, at: str, number: signal.Signals) -> Path:
    """What an attempt left that a signal stopped as soon as it had written a layer, or remembered a choice for it."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, "compress", tiny, "--recipe", recipe, "--out", str(out),
         "--calibration", str(text), "--num-samples", "8", "--device", "cpu", at, str(int(number))],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
    assert ("goes on from there" in done.stderr) == (number == signal.SIGINT)
    (found,) = out.parent.glob(".partial-out-*")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "number"), [("gptq4", signal.SIGKILL), ("wanda50+awq4", signal.SIGINT), ("sparsegpt50", signal.SIGKILL)]
)
def test_a_stopped_compression_goes_on_to_the_same_bytes(
    tiny: str, recipe: str, number: signal.Signals, text: Path, tmp_path: Path
) -> None:
    partial = stopped(tiny, recipe, text, tmp_path / "out", "write:model.layers.0", number)
    assert not (partial / "model.layers.1.safetensors").exists()
    made = (partial / "model.layers.0.safetensors").stat().st_mtime_ns
    resumed = whole(tiny, recipe, text, tmp_path / "out")
    assert (tmp_path / "out" / "model.layers.0.safetensors").stat().st_mtime_ns == made
    assert resumed == whole(tiny, recipe, text, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "note", "number"),
    [
        ("structured25+gptq4", "cut-model.layers.0.mlp.down_proj", signal.SIGKILL),
        ("mixed4.5", "sensitivity-model.layers.0", signal.SIGINT),
    ],
)
def test_what_was_chosen_for_a_layer_is_not_chosen_again(
    tiny: str,
    recipe: str,
    note: str,
    number: signal.Signals,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped(tiny, recipe, text, tmp_path / "out", f"remember:{note}", number)
    remember, chosen = Draft.remember, []

    def noting(self: Draft, name: str, facts: Mapping[str, Any]) -> None:
        chosen.append(name)
        remember(self, name, facts)

    monkeypatch.setattr(Draft, "remember", noting)
    resumed = whole(tiny, recipe, text, tmp_path / "out")
    assert note not in chosen
    assert note.replace("layers.0", "layers.1") in chosen
    assert resumed == whole(tiny, recipe, text, tmp_path / "whole")
    assert note in chosen


def test_what_another_recipe_began_is_never_taken_over(tiny: str, text: Path, tmp_path: Path) -> None:
    other = tmp_path / ".partial-out-01234567"
    other.mkdir()
    whole(tiny, "int8", text, tmp_path / "out")
    assert not other.exists()
