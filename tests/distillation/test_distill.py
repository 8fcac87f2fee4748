"""A student is an ordinary checkpoint that learnt, whatever happened on the way; pruned weights stay pruned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from serve.cli import app
from serve.compression.artifact import Artifact
from serve.compression.calibration import Calibration
from serve.compression.recipe import Recipe
from serve.distillation import Settings
from serve.distillation.distill import distill
from serve.distillation.gradual import compress_gradually
from serve.distillation.school import Text
from serve.distillation.training import CHECKPOINT_STEPS
from serve.errors import SetupError
from serve.loading import load

ROOT = Path(__file__).resolve().parents[2]
SHORT = Settings(
    steps=CHECKPOINT_STEPS + 5, batch_size=4, window_tokens=32, learning_rate=1e-3, soft_weight=1.0, hard_weight=0.0
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def teacher(tmp_path: Path, shared: Path) -> str:
    """Small and untrained, but sure of itself, so that there is something to lose and to learn."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2048, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 8
    model.save_pretrained(tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        content = (shared / "models" / "TinyStories-656K" / name).read_bytes()
        (tmp_path / "teacher" / name).write_bytes(content)
    return str(tmp_path / "teacher")


@pytest.fixture
def text(shared: Path) -> Text:
    return Text(shared / "data" / "tinystories" / "calib.jsonl", held_out=8)


@pytest.fixture
def calibration(shared: Path) -> Calibration:
    return Calibration(shared / "data" / "tinystories" / "calib.jsonl", num_samples=4)


class Interrupting:
    """Progress that somebody interrupts at a step."""

    def __init__(self, stage: str, step: int) -> None:
        self.at = (stage, step)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if (stage, done) == self.at:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_student_is_an_ordinary_smaller_checkpoint_that_learnt(
    teacher: str, text: Text, calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    found = distill(teacher, out, text, student="depth33+structured50", settings=SHORT, calibration=calibration)
    assert found.after.kl_divergence < found.before.kl_divergence
    assert found.recovered_ratio == pytest.approx(1 - found.after.kl_divergence / found.before.kl_divergence)
    assert found.parameters < found.teacher_parameters
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    student = AutoModelForCausalLM.from_pretrained(out)
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (2, 48)
    small = load(str(out), Recipe.parse("int8"), device="cpu")
    assert small.report.precision == "int8"
    assert not list(tmp_path.glob(".*-student-*"))


def test_an_interrupted_lesson_ends_with_the_same_weights(
    teacher: str, text: Text, calibration: Calibration, tmp_path: Path
) -> None:
    def learn(out: Path, progress: Any = lambda *_: None) -> None:
        distill(teacher, out, text, student="structured50", settings=SHORT, calibration=calibration, progress=progress)

    learn(tmp_path / "whole")
    for interruption in (Interrupting("distil", 3), Interrupting("distil", CHECKPOINT_STEPS + 2)):
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path / "again", interruption)
        assert not (tmp_path / "again").exists()
    seen: list[int] = []
    learn(tmp_path / "again", lambda stage, done, total: seen.append(done) if stage == "distil" else None)
    assert seen[0] == CHECKPOINT_STEPS
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


KILLED = f"""
import os, signal
from serve.cli import main
from serve.distillation.training import _Lesson

learn = _Lesson.learn

def learn_and_die(self, text, step):
    learn(self, text, step)
    if step == {CHECKPOINT_STEPS + 2}:
        os.kill(os.getpid(), signal.SIGKILL)

_Lesson.learn = learn_and_die
main()
"""


def test_a_lesson_killed_amid_an_epoch_goes_on_from_its_checkpoint(
    teacher: str, text: Text, calibration: Calibration, tmp_path: Path
) -> None:
    def learn(out: Path, progress: Any = lambda *_: None) -> None:
        distill(teacher, out, text, settings=SHORT, calibration=calibration, progress=progress)

    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "distill", teacher, "--out", str(tmp_path / "again"),
         "--data", str(text.file), "--held-out", str(text.held_out), "--steps", str(SHORT.steps),
         "--batch-size", "4", "--window-tokens", "32", "--learning-rate", "1e-3", "--soft-weight", "1",
         "--hard-weight", "0", "--calibration", str(calibration.file), "--num-samples", "4"],
        cwd=ROOT, env=os.environ | threads, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "again").exists()
    seen: list[int] = []
    learn(tmp_path / "again", lambda stage, done, total: seen.append(done) if stage == "distil" else None)
    assert seen[0] == CHECKPOINT_STEPS
    learn(tmp_path / "whole")
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


def test_chosen_layers_are_the_teachers_own(teacher: str, text: Text, tmp_path: Path) -> None:
    out = tmp_path / "student"
    nothing = Settings(steps=1, batch_size=1, window_tokens=8, learning_rate=1e-12, weight_decay=0.0)
    distill(teacher, out, text, student="", layers=[0, 2], settings=nothing)
    before, after = load_file(Path(teacher) / "model.safetensors"), load_file(out / "model.safetensors")
    for ours, theirs in ((0, 0), (1, 2)):
        name = "model.layers.{}.mlp.up_proj.weight"
        torch.testing.assert_close(after[name.format(ours)], before[name.format(theirs)])
    assert "model.layers.2.mlp.up_proj.weight" not in after


def test_without_a_text_the_teacher_writes_one(teacher: str, calibration: Calibration, tmp_path: Path) -> None:
    text = Text(sampled=40, held_out=8)
    for name in ("one", "two"):
        distill(teacher, tmp_path / name, text, settings=SHORT, calibration=calibration)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_a_student_may_begin_as_another_model(
    teacher: str, text: Text, calibration: Calibration, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    distill(teacher, first, text, student="depth33", settings=SHORT, calibration=calibration)
    found = distill(teacher, second, text, student=str(first), settings=SHORT)
    assert found.after.kl_divergence < found.before.kl_divergence


@pytest.mark.parametrize("recipe", ["wanda50", "magnitude60+gptq4-g32", "sparsegpt-2:4", "structured50+wanda50+int8"])
def test_gradual_pruning_removes_all_it_should_and_shows_each_step(
    recipe: str, teacher: str, text: Text, calibration: Calibration, tmp_path: Path
) -> None:
    parsed = Recipe.parse(f"fp32+{recipe}")
    found = compress_gradually(
        teacher, parsed, tmp_path / "out", text, steps=2, settings=SHORT, calibration=calibration
    )  # fmt: skip
    assert len(found.steps) == (1 if "2:4" in recipe else 2)
    for step in found.steps:
        assert step.after.kl_divergence < step.before.kl_divergence
    assert [step.parameters for step in found.steps] == sorted((s.parameters for s in found.steps), reverse=True)
    assert found.report is not None
    noted = Artifact.open(tmp_path / "out").manifest["quality"]
    assert noted == found.report.quality
    assert (noted["kl_divergence"], noted["tokens"]) == (found.result.kl_divergence, found.result.tokens)
    loaded = load(str(tmp_path / "out"), Recipe.parse(found.report.recipe), device="cpu")
    removed = 0.6 if "60" in recipe else 0.5
    for name, layer in loaded.model.named_modules():
        if name.endswith("_proj") and "int8" not in recipe and "gptq4" not in recipe:
            weight = layer.dequantize()
            assert (weight == 0).float().mean().item() == pytest.approx(removed, abs=0.02)
            assert "2:4" not in recipe or ((weight.view(-1, 4) != 0).sum(1) <= 2).all()
    assert found.result.kl_divergence < 2 * found.steps[-1].after.kl_divergence


def test_zeros_stay_zeros_while_the_rest_recovers(
    teacher: str, text: Text, calibration: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress_gradually(
            teacher, Recipe.parse("wanda50"), tmp_path / "out", text, steps=2, settings=SHORT,
            calibration=calibration, progress=_at_the_second_lesson(),
        )  # fmt: skip
    (folder,) = tmp_path.glob(".lessons-out-*")
    states = [load_file(folder / name / "model.safetensors") for name in ("pruned-1", "recovered-1", "pruned-2")]
    for name in (name for name in states[0] if name.endswith("_proj.weight")):
        first, recovered, second = (state[name] != 0 for state in states)
        assert torch.equal(first, recovered)
        assert not (second & ~first).any()  # what is gone is gone
        assert not torch.equal(states[0][name], states[1][name])


def _at_the_second_lesson() -> Any:
    lessons = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "distil" and done == 0:
            lessons.append(done)
            if len(lessons) == 2:
                raise KeyboardInterrupt

    return progress


def test_gradual_cutting_ends_at_the_size_of_cutting_at_once(
    teacher: str, text: Text, calibration: Calibration, tmp_path: Path
) -> None:
    recipe = Recipe.parse("fp32+depth33+structured50")
    found = compress_gradually(
        teacher, recipe, tmp_path / "out", text, steps=3, settings=SHORT, calibration=calibration
    )
    at_once = load(teacher, recipe, device="cpu", calibration=calibration)
    gradual = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: p.shape for name, p in gradual.named_parameters()} == {
        name: p.shape for name, p in at_once.model.named_parameters()
    }
    assert found.report is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["distill", "{teacher}", "--student", "int8", "--out", "{out}"], "expected cuts alone"),
        (["distill", "{teacher}", "--layers", "0,7", "--out", "{out}", "--sampled", "40"], "name some of 0 to 2"),
        (["distill", "{teacher}", "--layers", "a", "--out", "{out}"], "not a list of numbers"),
        (["distill", "{teacher}", "--out", "{teacher}"], "exists already"),
        (["distill", "{teacher}", "--out", "{out}", "--data", "none.jsonl"], "no such text file"),
        (["distill", "{teacher}", "--out", "{out}", "--sampled", "5"], "must write more than 32"),
        (["compress", "{teacher}", "--recipe", "int8", "--gradual", "--out", "{out}"], "nothing to prune"),
        (["compress", "{teacher}", "--recipe", "wanda50", "--gradual"], "say where with --out"),
    ],
)
def test_a_mistake_is_told_before_anything_is_learnt(
    arguments: list[str], told: str, teacher: str, tmp_path: Path
) -> None:
    filled = [part.format(teacher=teacher, out=tmp_path / "out") for part in arguments]
    done = CliRunner().invoke(app, filled)
    assert isinstance(done.exception, SetupError), done.output
    assert told in done.exception.message


@pytest.mark.slow
def test_a_short_distillation_recovers_half_of_what_structured_pruning_lost(shared: Path, tmp_path: Path) -> None:
    stories = shared / "data" / "tinystories"
    done = CliRunner().invoke(
        app,
        ["distill", str(shared / "models" / "TinyStories-656K"), "--out", str(tmp_path / "out"),
         "--student", "structured25", "--data", str(stories / "train.jsonl"), "--steps", "120",
         "--text", str(stories / "eval.jsonl"), "--held-out", "32",
         "--calibration", str(stories / "calib.jsonl"), "--device", "cpu", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["before"]["kl_divergence"] > 0.3
    assert found["recovered_ratio"] >= 0.5
