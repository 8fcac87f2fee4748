"""Memory: what the report says is what the process holds, and loading never needs much more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from serve.compression.loader import Loader
from serve.compression.memory import TensorPeak
from serve.compression.recipe import Recipe

MEASURE = """
import json, sys, torch
from serve.compression.memory import anonymous_bytes, release
from serve.compression.recipe import Recipe
from serve.loading import load

small, big, recipe = sys.argv[1:]
torch.set_num_threads(1)
warm = load(small, Recipe.parse(recipe))  # imports, thread pools and kernels are not weights
warm.model(torch.arange(8)[None])
del warm
release()
before = anonymous_bytes()
loaded = load(big, Recipe.parse(recipe))
release()
held = anonymous_bytes() - before
print(json.dumps(loaded.report.to_dict() | {"held_bytes": held}))
"""


def save(folder: Path, hidden: int, layers: int) -> None:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={chr(33 + n): n for n in range(90)}, merges=[]))
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    small, big = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("big")
    save(small, 128, 2)
    save(big, 1024, 6)
    return small, big


CALIBRATE = """
import json, sys, torch
from pathlib import Path
from serve.compression.calibration import Calibration
from serve.compression.memory import release
from serve.compression.recipe import Recipe
from serve.loading import load

small, big, text, *recipes = sys.argv[1:]
torch.set_num_threads(1)
text = Calibration(Path(text), num_samples=16, max_tokens=128)
for name in recipes:
    recipe = Recipe.parse(name)
    calibration = text if recipe.needs_calibration else None
    load(small, recipe, calibration=calibration)
    release()
    print(json.dumps({"asked": name} | load(big, recipe, calibration=calibration).report.to_dict()))
"""
ON_A_WIDE_MODEL = ("gptq4-g64",)
ON_A_MIDDLING_ONE = (
    "structured25+gptq4", "magnitude50", "wanda50", "wanda-2:4+gptq4", "sparsegpt50", "depth50", "int8-static",
    "awq4", "mixed4.5",
)  # fmt: skip


def calibrated(small: Path, big: Path, text: Path, recipes: Sequence[str]) -> dict[str, Any]:
    """The report of each recipe, from a process of its own."""
    text.write_text("".join(json.dumps({"text": " ".join(chr(33 + (7 * n + k) % 90) for k in range(128))}) + "\n"
                            for n in range(16)))  # fmt: skip
    arguments = [sys.executable, "-c", CALIBRATE, *map(str, (small, big, text)), *recipes]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {report["asked"]: report for report in reports}


@pytest.fixture(scope="module")
def calibrations(
    checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, Any]]:
    """The width of the model, and the report, of each recipe."""
    reports: dict[str, tuple[int, Any]] = {}
    for width, recipes in ((1024, ON_A_WIDE_MODEL), (512, ON_A_MIDDLING_ONE)):
        folder = tmp_path_factory.mktemp("calibrated")
        save(folder, width, 2)
        measured = calibrated(checkpoints[0], folder, folder / "text.jsonl", recipes)
        reports |= {name: (width, report) for name, report in measured.items()}
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ON_A_WIDE_MODEL + ON_A_MIDDLING_ONE)
def test_calibrating_takes_what_the_report_states(calibrations: dict[str, tuple[int, Any]], recipe: str) -> None:
    width, report = calibrations[recipe]
    if Recipe.parse(recipe).needs_calibration:
        assert report["activation_bytes"] >= 2 * width * report["calibration_tokens"] > 0
    if any(method in recipe for method in ("gptq", "awq", "mixed", "sparsegpt", "structured")):
        assert report["hessian_bytes"] >= 4 * (3 * width) ** 2
    block_bytes = (3 + 9) * width * width * 2  # q, k, v, o and the MLP in 16 bits
    stated = report["activation_bytes"] + report["hessian_bytes"]
    assert report["peak_load_bytes"] < report["total_bytes"] + 2 * block_bytes + stated


@pytest.mark.parametrize("recipe", ["gptq4-g64", "awq4-g64", "wanda50", "int8"])
def test_nobody_keeps_the_dense_weights_of_a_compressed_layer(checkpoints: tuple[Path, Path], recipe: str) -> None:
    with Loader.opened(str(checkpoints[0]), Recipe.parse(recipe), device="cpu") as loader:
        loader.fill(None)
    assert all(weight.is_meta for module in loader.skeleton.projections.values() for weight in module.parameters())


def test_the_peak_of_tensors_is_counted_to_the_byte() -> None:
    before = torch.zeros(1000)
    with TensorPeak() as taken:
        before.add_(1)  # was there already
        first = before + 1
        assert first.view(10, 100).shape == (10, 100)
        del first
        second = before * 2
        third = second.to(torch.float64)
        del second, third
        torch.zeros(1500)
    assert taken.peak_bytes == 4000 + 8000


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "int8", "int8-weight", "nf4"])
def test_resident_bytes_match_the_report_and_the_peak_stays_low(checkpoints: tuple[Path, Path], recipe: str) -> None:
    arguments = [sys.executable, "-c", MEASURE, *map(str, checkpoints), recipe]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert abs(report["held_bytes"] - report["total_bytes"]) <= 0.03 * report["total_bytes"]
    block_bytes = (3 + 9) * 1024 * 1024 * 2  # q, k, v, o and the MLP in 16 bits
    assert report["peak_load_bytes"] < report["total_bytes"] + 2 * block_bytes
