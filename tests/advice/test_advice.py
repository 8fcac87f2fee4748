"""Advice follows from what was measured: nothing too large, nothing below the floor, and a reason for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve.advice import DEVICES, Advice, Candidate, Target, judge
from serve.advice.footprint import measure
from serve.advice.target import parse_bytes
from serve.cli import app
from serve.compression.recipe import Recipe
from serve.errors import ConfigError
from serve.loading import load

STORYTELLER = "builtin:storyteller"
GB = 10**9


def candidate(recipe: str, gb: float, kl: float, kept: float, speed: float | None = None) -> Candidate:
    return Candidate(recipe, "model", int(gb * GB), int(gb * GB) + GB // 10, kl, kept, 0.01, speed, None)


MEASURED = [
    candidate("bf16", 2.0, 0.0001, 1.0, 100),
    candidate("int8", 1.1, 0.002, 0.999, 210),
    candidate("nf4", 0.6, 0.05, 0.98, 90),
    candidate("gptq4-g64", 0.61, 0.03, 0.985, 205),
    candidate("gptq3-g64", 0.45, 0.15, 0.93, 215),
]


def verdicts(target: Target) -> dict[str, tuple[str, str]]:
    return {found.recipe: (found.verdict, found.reason) for found in judge(MEASURED, target)}


def test_a_server_gets_the_fastest_that_keeps_the_floor_and_of_equals_the_closest() -> None:
    found = verdicts(Target("cpu", 10 * GB))
    assert found["int8"][0] == "recommended"
    assert found["gptq3-g64"] == ("ruled out", "keeps 93.0% of the accuracy, and the floor is 97.0%")
    assert found["bf16"] == ("suitable", "0.48 of int8's speed, though closer to the reference")
    assert found["nf4"] == ("suitable", "0.43 of int8's speed, and no closer to the reference")
    assert judge(MEASURED, Target("cpu", 10 * GB))[0].recipe == "int8"


def test_a_small_device_gets_the_smallest_and_of_equals_the_closest() -> None:
    found = verdicts(Target("edge", 10 * GB))
    assert found["gptq4-g64"] == ("recommended", "among the smallest (within 5%) the closest to the reference")
    assert found["nf4"][0] == "suitable"


def test_what_does_not_fit_is_ruled_out_with_both_sizes() -> None:
    found = verdicts(Target("cpu", int(0.8 * GB)))
    assert found["int8"] == ("ruled out", "needs 1.2 GB of memory, and there are 800 MB")
    assert found["gptq4-g64"][0] == "recommended"


def test_kl_can_veto_what_accuracy_allows() -> None:
    assert verdicts(Target("edge", 10 * GB, max_kl=0.01))["int8"] == (
        "recommended", "the smallest that fits and keeps the floor",
    )  # fmt: skip


def test_where_nothing_is_left_nothing_is_recommended() -> None:
    assert {found.verdict for found in judge(MEASURED, Target("phone", GB // 10))} == {"ruled out"}
    not_a_number = [candidate("bf16", 1, float("nan"), float("nan"))]
    assert judge(not_a_number, Target("cpu", 10 * GB))[0].verdict == "ruled out"


@pytest.mark.parametrize(
    ("device", "recipe", "agrees"),
    [("cuda", "fp16", True), ("cpu", "int8", True), ("cpu", "nf4", False), ("edge", "structured25+gptq4-g64", True),
     ("edge", "int8", False)],
)  # fmt: skip
def test_the_rule_of_thumb_is_compared_with_what_was_found(device: Any, recipe: str, agrees: bool) -> None:
    target = Target(device, GB)
    found = judge([candidate(recipe, 0.1, 0.0, 1.0, 1.0)], target)
    assert Advice(target, "model", "fp32", found).follows_rule is agrees


def test_a_distilled_student_agrees_with_the_rule_on_the_edge() -> None:
    found = judge([candidate("int8", 0.1, 0.0, 1.0)], Target("edge", GB))
    assert Advice(Target("edge", GB), "its teacher", "fp32", found).follows_rule


@pytest.mark.parametrize(
    ("text", "count"), [("8GiB", 8 << 30), ("8GB", 8 * GB), ("512MiB", 512 << 20), ("1.5g", 1500000000), ("100", 100)]
)
def test_memory_is_read_as_people_write_it(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "8 apples", "-1GB", "0"])
def test_other_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="memory"):
        parse_bytes(text)


def test_every_usual_recipe_can_be_read() -> None:
    for device in DEVICES.values():
        assert [Recipe.parse(name).name for name in device.recipes] == list(device.recipes)


def test_a_size_told_from_the_configuration_is_that_of_the_loaded_model() -> None:
    recipes = [Recipe.parse(name) for name in ("fp32", "bf16", "int8", "nf4", "rtn4-g32", "depth25")]
    found = measure(lambda *_: None, STORYTELLER, recipes, "cpu")
    for recipe in recipes[:5]:
        loaded = load(STORYTELLER, recipe, device="cpu").report.total_bytes
        assert loaded <= found.model_bytes[recipe.name] <= 1.04 * loaded  # nf4 may store its scales in 16 bits
    assert found.model_bytes["depth25"] < found.model_bytes["bf16"]
    assert found.kv_bytes["bf16"] == 2 * 2 * 4 * 4 * 32 * 1024
    assert found.kv_bytes["depth25"] < found.kv_bytes["bf16"]
    assert found.dense_bytes == found.model_bytes["fp32"]


@pytest.mark.slow
def test_advice_is_measured_on_the_model_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFTONE_ARTIFACTS", str(tmp_path))
    done = CliRunner().invoke(
        app,
        ["advise", STORYTELLER, "--device", "edge", "--memory", "9MB", "--recipe", "bf16", "--recipe", "int8",
         "--recipe", "rtn4", "--floor", "0.97", "--limit", "4", "--threads", "1", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["recommended"]["recipe"] == "int8"
    verdicts = {one["recipe"]: one for one in found["candidates"]}
    assert "not measured" in verdicts["bf16"]["reason"]
    assert "the floor is 97.0%" in verdicts["rtn4"]["reason"]
    assert verdicts["int8"]["kl_divergence"] < verdicts["rtn4"]["kl_divergence"]
    assert found["follows_rule"] is False
    assert "tokens_per_s" in verdicts["int8"]


def test_where_nothing_fits_it_says_so_and_fails() -> None:
    done = CliRunner().invoke(app, ["advise", STORYTELLER, "--device", "phone", "--memory", "1MB", "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["recommended"] is None
    assert "distil a student" in " ".join(found["remarks"])
