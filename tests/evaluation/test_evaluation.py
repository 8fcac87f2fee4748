"""Recipes against a reference: the JSON's shape, the figures, what is shared and what is told."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from serve.bench import Bench, Speed
from serve.commands.evaluation_markdown import markdown
from serve.commands.evaluation_table import print_details, print_tables
from serve.compression.artifact import Store
from serve.compression.calibration import Calibration
from serve.compression.recipe import Recipe
from serve.errors import SetupError
from serve.evaluation import STORIES, Evaluation, Reference, Row, Setup
from serve.evaluation.plot import check, draw
from serve.evaluation.result import plain
from serve.evaluation.scoring import record_reference, score
from serve.loading import load
from serve.rollout.proposal import expected_of

SETUP = Setup("builtin:storyteller", Recipe.parse("fp32"), limit=4, device="cpu", fresh=True)
RECIPES = ("fp32", "bf16", "int8")
# DESIGN, Interfaces: scripts and dashboards rely on these names.
ROW = [
    "recipe", "bits_per_weight", "bytes", "compression_ratio", "perplexity", "perplexity_ratio", "kl_divergence",
    "top1_agreement", "accuracy", "flips", "load_s", "peak_load_bytes", "speed", "efficiency",
]  # fmt: skip


def silent(stage: str, done: int, total: int) -> None:
    pass


def bench(recipe: str, tokens_per_s: float) -> Bench:
    speed = (Speed("prefill", 1, 900.0), Speed("decode", 1, tokens_per_s), Speed("decode", 8, 4 * tokens_per_s))
    numbers = dict.fromkeys(
        ["total_bytes", "weight_bytes", "quantization_bytes", "embedding_bytes", "kv_cache_bytes", "peak_load_bytes",
         "resident_bytes", "peak_bytes", "device_peak_bytes"], 1,
    )  # fmt: skip
    return Bench(
        recipe, recipe, "cpu", 1, "plain path: made up", False, 1.0, 1.0,
        bits_per_weight=8.0, compression_ratio=2.0, kernels={}, speed=speed, **numbers,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return record_reference(silent, SETUP, tmp_path_factory.mktemp("logits"))


@pytest.fixture(scope="module")
def rows(reference: Reference) -> list[Row]:
    return [Row(score(silent, SETUP, Recipe.parse(name), reference), reference) for name in RECIPES]


@pytest.fixture
def evaluation(rows: list[Row], reference: Reference) -> Evaluation:
    timed = [
        replace(row, bench=bench(row.recipe, 100.0 * (1 + n)), reference_bench=bench("fp32", 100.0))
        for n, row in enumerate(rows)
    ]
    return Evaluation(SETUP, [Recipe.parse(name) for name in RECIPES], reference=reference, rows=timed)


def test_the_json_has_the_promised_shape(evaluation: Evaluation) -> None:
    found = json.loads(json.dumps(plain(evaluation.to_dict()), allow_nan=False))
    assert found["reference"] == "fp32"
    for row, name in zip(found["rows"], RECIPES, strict=True):
        assert list(row)[:-1] == ROW  # what follows is `details`, which promises nothing
        assert row["recipe"] == name
        assert {"mean", "p50", "p90", "p99", "max"} <= row["kl_divergence"].keys()
        assert all(isinstance(row[key], float | int) for key in ROW if key not in ("recipe", "kl_divergence", "speed"))
        for speed in row["speed"]:
            assert list(speed) == ["phase", "batch_size", "tokens_per_s"]
        assert [(s["phase"], s["batch_size"]) for s in row["speed"]] == [("prefill", 1), ("decode", 1), ("decode", 8)]


def test_a_row_without_speed_has_none_and_no_efficiency(rows: list[Row]) -> None:
    row = rows[2].to_dict()
    assert (row["speed"], row["efficiency"]) == ([], None)


def test_the_reference_against_itself_differs_in_nothing(rows: list[Row]) -> None:
    row = rows[0].to_dict()
    assert row["kl_divergence"]["max"] == 0
    assert (row["perplexity_ratio"], row["top1_agreement"], row["flips"], row["compression_ratio"]) == (1, 1, 0, 1)


def test_sixteen_bits_differ_as_little_as_the_noise_floor_says(rows: list[Row], reference: Reference) -> None:
    noise = reference.noise_floor
    assert noise is not None
    assert 0 < noise["kl_divergence"] < 0.01
    assert rows[1].kl_divergence == pytest.approx(noise["kl_divergence"], rel=0.5)
    assert rows[2].kl_divergence > 2 * noise["kl_divergence"]


def test_efficiency_is_accuracy_over_size_times_speed(evaluation: Evaluation) -> None:
    assert evaluation.rows[0].efficiency == pytest.approx(1.0)
    int8 = evaluation.rows[2]
    accuracy = int8.quality.divergence["accuracy"]
    expected = accuracy["variant"] / accuracy["reference"] / (int8.bytes / int8.reference.total_bytes) * 3.0
    assert int8.efficiency == pytest.approx(expected)


def test_a_quantized_reference_has_no_noise_floor(tmp_path: Path) -> None:
    setup = replace(SETUP, reference=Recipe.parse("int8"), limit=1)
    assert record_reference(silent, setup, tmp_path).noise_floor is None


def test_the_bundled_text_is_none_that_calibrates() -> None:
    from serve.compression.calibration import bundled

    assert not set(Calibration(STORIES).texts()) & set(bundled().texts())


def test_another_tokenizer_cannot_be_compared(reference: Reference) -> None:
    other = replace(reference, records=((1, 2, 3),))
    with pytest.raises(SetupError, match="different tokens"):
        score(silent, replace(SETUP, reference_source="elsewhere"), Recipe.parse("bf16"), other)


def test_logits_that_do_not_fit_the_disk_are_refused_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(SetupError, match="--limit"):
        record_reference(silent, SETUP, tmp_path)


def test_one_recipe_that_fails_does_not_stop_the_others(
    rows: list[Row], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_fails(progress: object, setup: Setup, recipe: Recipe, reference: Reference) -> object:
        if recipe.name == "bf16":
            raise SetupError("no such luck")
        return rows[RECIPES.index(recipe.name)].quality

    monkeypatch.setattr("serve.evaluation.evaluation._record", lambda *_: reference)
    monkeypatch.setattr("serve.evaluation.evaluation._score", one_fails)
    evaluation = Evaluation(SETUP, [Recipe.parse(name) for name in RECIPES], bench=None)
    from serve.commands.terminal import Steps

    evaluation.run(Steps(4, Console(file=io.StringIO())))
    assert [row.recipe for row in evaluation.rows] == ["fp32", "int8"]
    assert evaluation.failed == {"bf16": "no such luck"}


def test_the_tables_name_reference_noise_floor_front_and_efficiency(evaluation: Evaluation) -> None:
    out = io.StringIO()
    print_tables(evaluation, Console(file=out, width=200))
    shown = out.getvalue()
    for part in (
        "Reference fp32: perplexity",
        "Noise floor",
        "int8 ◆",
        "efficiency = accuracy kept",
        "decode 8, tok/s",
    ):
        assert part in shown


def test_details_hold_every_statistic_of_llama_cpp(evaluation: Evaluation) -> None:
    out = io.StringIO()
    print_details(evaluation, Console(file=out, width=200))
    names = [
        "Mean PPL(Q)", "Mean PPL(base)", "Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean ln(PPL(Q)/PPL(base))",
        "Mean PPL(Q)/PPL(base)", "Mean PPL(Q)-PPL(base)", "Mean KLD", "Maximum KLD", "99.9% KLD", "99.0% KLD",
        "95.0% KLD", "90.0% KLD", "Median KLD", "10.0% KLD", "5.0% KLD", "1.0% KLD", "0.1% KLD", "Minimum KLD",
        "Mean Δp", "Maximum Δp", "99.9% Δp", "Median Δp", "0.1% Δp", "Minimum Δp", "RMS Δp", "Same top p",
    ]  # fmt: skip
    assert [name for name in names if name not in out.getvalue()] == []


@pytest.mark.parametrize("timed", [True, False])
def test_the_plot_is_drawn_with_and_without_speed(
    evaluation: Evaluation, rows: list[Row], tmp_path: Path, timed: bool
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.svg"
    draw(evaluation.rows if timed else rows, file)
    assert (file.read_text().count('id="axes_2"') == 1) == timed


def test_a_plot_that_cannot_be_drawn_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SetupError, match="must end in"):
        check(tmp_path / "plot.doc")
    with pytest.raises(SetupError, match="is no folder"):
        check(tmp_path / "none" / "plot.png")
    monkeypatch.setattr("serve.evaluation.plot.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"halftone\[plot\]"):
        check(tmp_path / "plot.png")


def test_what_is_not_a_number_becomes_null() -> None:
    assert plain({"a": [math.nan, 1.0], "b": (math.inf,)}) == {"a": [None, 1.0], "b": [None]}


@pytest.mark.slow
def test_the_figures_are_those_of_the_field_on_a_known_model(shared: Path, tmp_path: Path) -> None:
    model = str(shared / "models/TinyStories-656K")
    text, calibration = (shared / f"data/tinystories/{name}.jsonl" for name in ("eval", "calib"))
    setup = Setup(
        model, Recipe.parse("fp32"), text, limit=120, device="cpu", fresh=True, calibration=Calibration(calibration)
    )
    reference = record_reference(silent, setup, tmp_path)
    assert reference.perplexity["value"] == pytest.approx(19.116, abs=0.001)
    found = {name: Row(score(silent, setup, Recipe.parse(name), reference), reference) for name in ("nf4", "gptq4-g64")}
    assert found["nf4"].kl_divergence == pytest.approx(0.0585, rel=0.15)
    assert found["gptq4-g64"].kl_divergence <= 0.0498
    assert found["gptq4-g64"].to_dict()["perplexity_ratio"] <= 1.0478


def test_an_artifact_remembers_what_was_measured_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFTONE_ARTIFACTS", str(tmp_path / "store"))
    longer, recipe = replace(SETUP, fresh=False, limit=2), Recipe.parse("int8")
    told = record_reference(silent, longer, tmp_path)
    found = score(silent, longer, recipe, told)
    shorter = replace(longer, limit=1)
    (tmp_path / "shorter").mkdir()
    score(silent, shorter, recipe, record_reference(silent, shorter, tmp_path / "shorter"))
    loaded = load("builtin:storyteller", recipe, device="cpu", artifacts=tmp_path / "store")
    assert loaded.report.artifact_hit
    assert loaded.report.quality["tokens"] == told.tokens
    assert loaded.report.quality["kl_divergence"] == found.divergence["kl_divergence"]["mean"]
    assert expected_of(loaded.report.to_dict()["quality"]).top1_agreement == found.divergence["top1_agreement"]
    Store(tmp_path / "store").open(loaded.fingerprint).verify()


def test_the_document_gets_the_measured_rows(evaluation: Evaluation) -> None:
    text = markdown(evaluation).splitlines()
    tables = [line for line in text if line.startswith("| `")]
    assert [line.split("`")[1] for line in tables] == [*RECIPES, *RECIPES]  # quality, then speed
    int8 = evaluation.rows[2]
    assert f"| {int8.bytes:,} | {int8.compression_ratio:.2f} |" in tables[2]
    assert tables[5].endswith(f"| {int8.efficiency:.2f} |")
    untimed = replace(evaluation, rows=[replace(row, bench=None) for row in evaluation.rows])
    assert len([line for line in markdown(untimed).splitlines() if line.startswith("| `")]) == len(RECIPES)
