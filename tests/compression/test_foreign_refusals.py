"""What others wrote and we cannot read, or what was damaged on the way, is refused by its name and with a remedy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from serve.compression.export.gptq import _gptq_tensors
from serve.compression.foreign_settings import read_settings
from serve.compression.formats.integer_grid import IntegerGrid
from serve.compression.formats.nf4 import bitsandbytes_functional
from serve.compression.methods.rtn import round_to_nearest
from serve.compression.recipe import Recipe
from serve.errors import CheckpointError
from serve.loading import load
from tests.compression.test_foreign import awq_words, rewrite


def gptq_tensors(weight: Tensor) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = _gptq_tensors(round_to_nearest(weight, IntegerGrid(4, 64, False), dtype=torch.float16))
    return tensors


def awq_tensors(weight: Tensor) -> dict[str, Tensor]:
    rounded = round_to_nearest(weight, IntegerGrid(4, 64, False), dtype=torch.float16)
    assert rounded.zero_points is not None
    codes = awq_words(rounded.codes.t().contiguous())
    return {"qweight": codes, "qzeros": awq_words(rounded.zero_points), "scales": rounded.scales}


def nf4_tensors(weight: Tensor) -> dict[str, Tensor]:
    functional = bitsandbytes_functional()
    packed, state = functional.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")
    return {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}


def int8_tensors(weight: Tensor) -> dict[str, Tensor]:
    largest = weight.float().abs().amax(1)
    return {"weight": (weight / largest[:, None] * 127).round().to(torch.int8), "SCB": largest}


WRITERS: dict[str, tuple[dict[str, Any], Callable[[Tensor], dict[str, Tensor]]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"}, gptq_tensors),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, awq_tensors),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4_tensors),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8_tensors),
}
SETTINGS: list[tuple[str, str, Any, str]] = [
    *(
        ("gptq", "quant_method", method, "gptq, awq")
        for method in ("hqq", "aqlm", "compressed-tensors", "fp8", None, 5)
    ),
    *(("gptq", "bits", bits, "2, 3, 4, 8 can") for bits in (5, 16, "four", None, 4.5, True, [4])),
    *(("gptq", "group_size", size, "multiples of 8") for size in (7, 0, -2, None, 64.5)),
    *(("gptq", "checkpoint_format", form, "repack it as gptq") for form in ("marlin", "bitblas", "gptq_v3")),
    ("gptq", "is_marlin_format", True, "repack it as gptq"),
    ("gptq", "pack_dtype", "int8", "start from the uncompressed model"),
    ("gptq", "lm_head", True, "start from the uncompressed model"),
    ("gptq", "dynamic", {"+:.*down.*": {"bits": 8}}, "one setting for all layers"),
    *(("awq", "version", version, "gemm can") for version in ("gemv", "gemv_fast", "exllama", None)),
    *(("awq", "bits", bits, "4 can") for bits in (2, 3, 8)),
    ("awq", "backend", "llm-awq", "AutoAWQ"),
    ("nf4", "bnb_4bit_quant_type", "fp4", "nf4 can"),
    ("nf4", "load_in_4bit", False, "neither it nor load_in_8bit"),
]


@pytest.mark.parametrize(("kind", "field", "value", "remedy"), SETTINGS)
def test_settings_that_cannot_be_read_are_refused_by_field_and_remedy(
    tmp_path: Path, kind: str, field: str, value: object, remedy: str
) -> None:
    with pytest.raises(CheckpointError) as refused:
        read_settings({**WRITERS[kind][0], field: value}, tmp_path)
    assert f"quantization_config.{field} is {value!r}" in str(refused.value)
    assert remedy in str(refused.value)


def test_numbers_in_quotes_and_settings_without_a_method_are_read() -> None:
    assert read_settings({**WRITERS["gptq"][0], "bits": "4", "group_size": "-1"}, Path()).group_size == -1
    assert read_settings({"load_in_8bit": True}, Path()).method == "int8"


LAYER = "model.layers.0.self_attn.q_proj"
STATE = "weight.quant_state.bitsandbytes__nf4"
TENSORS: list[tuple[str, str, Callable[[Tensor], Tensor | None], str]] = [
    *(("gptq", key, lambda _: None, f"{LAYER}.{key} is missing") for key in ("qweight", "qzeros", "scales")),
    *(("awq", key, lambda _: None, f"{LAYER}.{key} is missing") for key in ("qweight", "qzeros", "scales")),
    *(("nf4", key, lambda _: None, f"{LAYER}.{key} is missing") for key in ("weight", "weight.absmax", STATE)),
    *(("int8", key, lambda _: None, f"{LAYER}.{key} is missing") for key in ("weight", "SCB")),
    *(("gptq", key, lambda t: t[:-1], "calls for int32") for key in ("qweight", "qzeros", "g_idx")),
    ("gptq", "scales", lambda t: t[:, 1:], r"\[2, 127\], but config.json calls for .* \[2, 128\]"),
    ("gptq", "qweight", lambda t: t.flatten(), r"int32 \[2048\], but config.json calls for int32 \[16, 128\]"),
    ("gptq", "qzeros", lambda t: t.float(), "float32"),
    ("gptq", "scales", lambda t: t * float("nan"), "NaN or infinite"),
    ("gptq", "g_idx", lambda t: t + 50, r"group_size 64; correct config.json"),
    ("gptq", "g_idx", lambda t: t - 1, r"group_size 64; correct config.json"),
    ("gptq", "g_idx", lambda t: t * 0, r"group_size 64; correct config.json"),
    ("gptq", "g_idx", lambda t: t.float(), "calls for int32 or int64"),
    ("awq", "qweight", lambda t: t.t(), r"int32 \[16, 128\], but config.json calls for int32 \[128, 16\]"),
    ("awq", "scales", lambda t: t / 0, "NaN or infinite"),
    ("nf4", "weight.absmax", lambda t: t[1:], r"calls for float32 \[256\]"),
    ("nf4", "weight.quant_map", lambda t: t * 2, "other levels than NF4"),
    ("nf4", STATE, lambda t: t[:-1], "no description of an NF4 layer"),
    ("nf4", STATE, lambda t: t * 0, "no description of an NF4 layer"),
    ("int8", "weight", lambda t: t[:-1], r"calls for int8 \[128, 128\]"),
    ("int8", "SCB", lambda t: t * float("inf"), "NaN or infinite"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> dict[str, Path]:
    """A sound checkpoint of each writer."""
    folder = tmp_path_factory.mktemp("written")
    for kind, (settings, replace) in WRITERS.items():
        rewrite(shared / "models" / "TinyStories-656K", folder / kind, settings, replace)
        load(str(folder / kind), Recipe.parse("bf16"))
    return {kind: folder / kind for kind in WRITERS}


@pytest.mark.parametrize(("kind", "key", "change", "reason"), TENSORS)
def test_tensors_that_are_not_what_config_json_says_are_refused_by_name(
    written: dict[str, Path],
    tmp_path: Path,
    kind: str,
    key: str,
    change: Callable[[Tensor], Tensor | None],
    reason: str,
) -> None:
    shutil.copytree(written[kind], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    changed = change(tensors.pop(f"{LAYER}.{key}"))
    if changed is not None:
        tensors[f"{LAYER}.{key}"] = changed.contiguous()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=reason) as refused:
        load(str(tmp_path / "model"), Recipe.parse("bf16"))
    assert LAYER in str(refused.value)
