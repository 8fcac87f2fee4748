"""Broken, dead, empty and scarce numbers: every method gives a finite model near the original, or names the layer."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from serve.compression.activations import BlockActivations
from serve.compression.compress import Reader, compress, silent
from serve.compression.formats.linear import CompressedLinear
from serve.compression.formats.llm_int8 import LlmInt8Linear
from serve.compression.methods.rounding import Fp8Method, LlmInt8Method
from serve.compression.plan import Plan
from serve.compression.recipe import Recipe
from serve.compression.sensitivity import mix
from serve.compression.sizes import cut_config
from serve.compression.skeleton import build
from serve.compression.stages import Mixed
from serve.compression.structure import cut
from serve.errors import CompressionError

CPU = torch.device("cpu")
QUANTIZERS = [
    "rtn2-g16", "rtn3-g16", "rtn4-g16", "rtn8-row", "gptq2-g16", "gptq3-g16", "gptq4-g16", "gptq4-g16-asym-act",
    "gptq8-g16", "awq4-g16", "awq4-g16-asym", "nf4", "nf4-dq", "int8", "int8-weight", "int8-static",
    "fp8", "llm-int8", "mixed4.5",
]  # fmt: skip
PRUNERS = ["magnitude50", "magnitude-2:4", "wanda50", "wanda-2:4", "sparsegpt50", "sparsegpt-2:4"]
BOTH = ["wanda-2:4+gptq4-g16", "sparsegpt50+int8", "magnitude50+nf4", "wanda50+awq4-g16", "wanda50+int8-static"]
CUTS = ["structured25", "structured50+gptq4-g16", "depth50", "depth50+int8"]
EVERY = QUANTIZERS + PRUNERS + BOTH + CUTS
CALIBRATED = [name for name in EVERY if Recipe.parse(name).needs_calibration]
COARSE = ("rtn2", "gptq2", "rtn3", "gptq3")
BLOCK = "model.layers.1"
NAMES_BLOCK = r"model\.layers\.1"


class Tensors(dict[str, Tensor]):
    """Weights at hand, as the driver reads them."""

    tied: dict[str, str] = {}  # noqa: RUF012
    unused_keys: tuple[str, ...] = ()

    def read(self, name: str) -> Tensor:
        return self[name]


@cache
def config() -> LlamaConfig:
    """No dimension divides by a group of 16, or by 8."""
    return LlamaConfig(
        vocab_size=60, hidden_size=28, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=64,
    )  # fmt: skip


def weights() -> Tensors:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
    return Tensors(
        {name: 5 * value.detach() if "proj" in name else value for name, value in model.state_dict().items()}
    )


def samples(tokens: int = 200) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 60, (min(20, tokens - at),), generator=generator).tolist() for at in range(0, tokens, 20)]


@pytest.fixture(autouse=True)
def on_any_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA alone multiplies is rounded as there, and multiplied by its plain reference."""
    monkeypatch.setattr(Fp8Method, "check", lambda *_: None)
    monkeypatch.setattr(LlmInt8Method, "check", lambda *_: None)
    monkeypatch.setattr(LlmInt8Linear, "forward", LlmInt8Linear.reference)


def compressed(tensors: Tensors, recipe: str, text: list[list[int]] | None = None) -> Any:
    parsed = Recipe.parse("+".join({"fp32": None, recipe: None}))
    text, size, weights = text or samples(), config(), cast(Reader, tensors)
    for stage in parsed.structures:
        whole, smaller = build(size, torch.float32), cut_config(size, stage)
        weights, size = cut(whole, weights, smaller, BlockActivations(whole, text, CPU), silent), smaller
    if isinstance(parsed.quantizer, Mixed):
        dense = build(size, torch.float32)
        compress(dense, weights, Plan(Recipe.parse("fp32"), CPU))
        parsed = mix(parsed, dense, text, CPU)
    skeleton = build(size, torch.float32)
    activations = BlockActivations(skeleton, text, CPU) if parsed.calibrates_layers else None
    compress(skeleton, weights, Plan(parsed, CPU), activations=activations)
    return skeleton.model


@torch.no_grad()
def divergence(tensors: Tensors, model: Any) -> float:
    """Mean KL from the same weights in float32; NaN or infinite if any of the model's answers is."""
    ids = torch.tensor(samples()[:4])
    p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (compressed(tensors, "fp32"), model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def limit(recipe: str) -> float:
    """Far above what the method loses here, and far below what a wrong scale or row would cost."""
    return 1.0 if any(name in recipe for name in (*COARSE, *PRUNERS, *CUTS)) else 0.1


@pytest.mark.parametrize("recipe", EVERY)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_names_its_layer(recipe: str, value: float) -> None:
    tensors = weights()
    tensors[f"{BLOCK}.mlp.up_proj.weight"][3, 5] = value
    with pytest.raises(CompressionError, match=rf"{NAMES_BLOCK}(\.mlp\.(up|down)_proj)?: "):
        compressed(tensors, recipe)


@pytest.mark.parametrize("recipe", CALIBRATED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_names_the_layer_that_reads_it(recipe: str, value: float) -> None:
    tensors = weights()
    tensors[f"{BLOCK}.post_attention_layernorm.weight"][7] = value
    with pytest.raises(CompressionError, match=rf"{NAMES_BLOCK}(\.mlp\.(gate|up|down)_proj)?: "):
        compressed(tensors, recipe)


@pytest.mark.parametrize("recipe", EVERY)
def test_dead_channels_empty_and_constant_rows_come_out_finite_and_near(recipe: str) -> None:
    tensors = weights()
    for block in ("model.layers.0", BLOCK):
        tensors[f"{block}.input_layernorm.weight"][5] = 0  # q, k and v never hear this input
        tensors[f"{block}.mlp.up_proj.weight"][9] = 0  # an empty row, and a dead input of down
        tensors[f"{block}.self_attn.q_proj.weight"][3] = 0
        tensors[f"{block}.self_attn.o_proj.weight"][2] = 0.05
        tensors[f"{block}.mlp.gate_proj.weight"][:] = tensors[f"{block}.mlp.gate_proj.weight"][:1]
    model = compressed(tensors, recipe)
    assert divergence(tensors, model) < limit(recipe)
    if recipe in CUTS:  # its rows are others
        return
    for name, row in (("self_attn.q_proj", 3), ("mlp.up_proj", 9)):
        layer = model.get_submodule(f"{BLOCK}.{name}")
        assert isinstance(layer, CompressedLinear)
        with torch.no_grad():
            assert not layer(torch.randn(5, layer.in_features))[:, row].any()


@pytest.mark.parametrize("recipe", EVERY)
def test_a_matrix_of_zeros_stays_one(recipe: str) -> None:
    tensors = weights()
    tensors[f"{BLOCK}.self_attn.v_proj.weight"].zero_()
    model = compressed(tensors, recipe)
    assert divergence(tensors, model) < limit(recipe)
    with torch.no_grad():
        last = model.model.layers[-1]  # the only one, where a layer was cut
        assert recipe.startswith("depth") or not last.self_attn.v_proj(torch.randn(5, 28)).any()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("recipe", CALIBRATED)
def test_too_little_text_for_the_hessian_gives_a_finite_result(recipe: str, tokens: int) -> None:
    tensors = weights()
    assert divergence(tensors, compressed(tensors, recipe, samples(tokens))) < 10 * limit(recipe)
