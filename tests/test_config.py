"""A configuration is read whole or refused by the path of its first mistake."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.config import default_config, load_config, parse_config, serve_source
from serve.errors import ConfigError, SetupError

ROOT = Path(__file__).resolve().parent.parent


def document(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "model": {"name": "m", "source": "builtin:storyteller"},
        "variants": [{"name": "bf16", "recipe": "bf16"}, {"name": "small", "recipe": "int8"}],
    }
    return {**whole, **changes}


def test_the_packaged_default_is_the_one_that_lies_in_deployments() -> None:
    assert (ROOT / "serve/default.yaml").read_text() == (ROOT / "deployments/local.yaml").read_text()
    config = default_config()
    assert config.model_name == "storyteller"
    assert [variant.name for variant in config.variants][:3] == ["bf16", "int8", "nf4"]


def test_without_traffic_the_first_variant_gets_all() -> None:
    split = parse_config(document()).split
    assert split.stable == "bf16"
    assert split.weights == {"bf16": 100, "small": 0}


def test_without_a_stable_one_the_heaviest_is_stable() -> None:
    split = parse_config(document(traffic={"weights": {"bf16": 30, "small": 70}})).split
    assert split.stable == "small"


def test_a_model_alone_makes_a_variant_of_each_recipe() -> None:
    config = serve_source("org/Tiny-1B", ("fp32", "int8-weight", "wanda50+gptq4-g64", "wanda-2:4"))
    assert config.model_name == "Tiny-1B"
    assert [variant.name for variant in config.variants] == ["fp32", "int8-weight", "wanda50_gptq4-g64", "wanda-2-4"]
    assert config.split.stable == "fp32"


def test_auto_is_decided_on_a_copy_and_leaves_every_variant_room() -> None:
    config = parse_config(document())
    resolved = config.resolved(cpus=2, gpus=0)
    assert config.variants[0].engine.threads is None
    assert [variant.engine.threads for variant in resolved.variants] == [1, 1]
    assert [variant.engine.threads for variant in config.resolved(cpus=9, gpus=0).variants] == [4, 4]
    assert sum(variant.resources.num_cpus or 0 for variant in resolved.variants) <= 2 - 0.1
    assert {variant.device for variant in resolved.variants} == {"cpu"}
    three = parse_config(document(api={"replicas": 3})).resolved(cpus=2, gpus=0)
    assert sum(variant.resources.num_cpus or 0 for variant in three.variants) <= 2 - 0.3


def test_the_intensity_of_electricity_is_stated_or_not_known() -> None:
    assert parse_config(document()).co2_grams_per_kwh is None
    assert parse_config(document(energy={"co2_grams_per_kwh": 380})).co2_grams_per_kwh == 380.0


@given(cpus=st.integers(1, 128), gpus=st.integers(0, 8), count=st.integers(1, 12))
def test_every_variant_fits_beside_the_others(cpus: int, gpus: int, count: int) -> None:
    variants = [{"name": f"v{index}", "recipe": "int8"} for index in range(count)]
    resolved = parse_config(document(variants=variants)).resolved(cpus=cpus, gpus=gpus)
    assert round(sum(variant.resources.num_cpus or 0 for variant in resolved.variants) + 0.1, 6) <= cpus
    assert round(sum(variant.resources.num_gpus or 0 for variant in resolved.variants), 6) <= gpus
    assert {variant.device for variant in resolved.variants} == {"cuda" if gpus else "cpu"}


@pytest.mark.parametrize(
    ("changes", "path", "told"),
    [
        ({"modle": {}}, "modle", "did you mean 'model'? allowed: model, variants"),
        ({"model": {"name": "m"}}, "model.source", "is missing"),
        ({"model": {"name": "m@1", "source": "x"}}, "model.name", "pattern"),
        ({"variants": []}, "variants", "at least 1 item"),
        ({"variants": [{"name": "a"}]}, "variants[0].recipe", "is missing"),
        ({"variants": [{"name": "a b", "recipe": "bf16"}]}, "variants[0].name", "pattern"),
        ({"variants": [{"name": "a", "recipe": "int9"}]}, "variants[0].recipe", "unknown name 'int9'"),
        ({"variants": [{"name": "a", "recipe": 8}]}, "variants[0].recipe", "expected a name"),
        ({"variants": [{"name": "a", "recipe": "bf16"}] * 2}, "variants[1].name", "given twice"),
        ({"variants": [{"name": "a", "recipe": "bf16", "replicas": "2"}]}, "variants[0].replicas", "valid integer"),
        ({"variants": [{"name": "a", "recipe": "bf16", "devise": 1}]}, "variants[0].devise", "did you mean 'device'?"),
        (
            {"variants": [{"name": "a", "recipe": "bf16", "engine": {"max_num_seq": 1}}]},
            "variants[0].engine.max_num_seq",
            "did you mean 'max_num_seqs'?",
        ),
        (
            {"variants": [{"name": "a", "recipe": "bf16", "engine": {"max_queue": 0}}]},
            "variants[0].engine.max_queue",
            "at least 1",
        ),
        ({"traffic": {"weights": {"bf16": 60, "smal": 40}}}, "traffic.weights", "did you mean 'small'?"),
        ({"traffic": {"weights": {"bf16": 60, "small": 30}}}, "traffic.weights", "sum to 100"),
        ({"traffic": {"stable": "int8"}}, "traffic.stable", "allowed: bf16, small"),
        ({"traffic": {"sticky": "cookie"}}, "traffic.sticky", "'user', 'header' or 'none'"),
        ({"api": {"limits": {"body_byte": 1}}}, "api.limits.body_byte", "did you mean 'body_bytes'?"),
        ({"api": {"keys": ["short"]}}, "api.keys[0]", "at least 8 characters"),
        ({"api": {"replicas": 0}}, "api.replicas", "greater than or equal to 1"),
        ({"energy": {"co2": 380}}, "energy.co2", "allowed: co2_grams_per_kwh"),
        ({"energy": {"co2_grams_per_kwh": -1}}, "energy.co2_grams_per_kwh", "greater than or equal to 0"),
        ({"drifts": {"sample_rate": 0.1}}, "drifts", "did you mean 'drift'?"),
        ({"drift": {"rate": 0.1}}, "drift.rate", "allowed: reference, sample_rate, max_busy_ratio"),
        ({"drift": {"sample_rate": 2}}, "drift.sample_rate", "less than or equal to 1"),
        ({"drift": {"reference": "nf4"}}, "drift.reference", "allowed: bf16, small"),
        ({"traffic": {"shadow": {"nf4": 0.1}}}, "traffic.shadow", "allowed: bf16, small"),
        ({"traffic": {"shadow": {"small": 10}}}, "traffic.shadow.small", "less than or equal to 1"),
    ],
)
def test_a_mistake_is_named_by_its_path(changes: dict[str, Any], path: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(document(**changes))
    assert refused.value.path == path
    assert told in refused.value.message


def test_a_key_is_never_shown_in_an_error() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(document(api={"keys": ["hunter2"]}))
    assert "hunter2" not in refused.value.message


@pytest.mark.parametrize("text", ["", "[]", "just text", "a: [", "\t- x", "model: {name: x, name: y"])
def test_a_file_that_is_no_configuration_is_one_clear_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert "\n" not in refused.value.message


def test_a_file_that_is_missing_or_binary_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "model", "recipe", "x"]), inner)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["model", "variants", "traffic", "api", "other"]), _json) | _json)
def test_no_document_whatever_raises_anything_but_a_setup_error(value: Any) -> None:
    with suppress(SetupError):
        parse_config(value)


def test_calibration_names_its_text_and_fails_by_its_path(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a story"}')
    gptq = {"name": "gptq4", "recipe": "gptq4", "calibration": {"file": str(text), "num_samples": 7}}
    calibration = parse_config(document(variants=[gptq])).variants[0].calibration
    assert calibration is not None
    assert (calibration.file, calibration.num_samples) == (text, 7)
    for wrong in ({}, {"file": 3}, {"file": "a", "samples": 4}, {"file": "a", "num_samples": 0}):
        with pytest.raises(ConfigError, match=r"variants\[0\]\.calibration"):
            parse_config(document(variants=[{**gptq, "calibration": wrong}]))
