"""Architectures: whatever transformers builds and saves, we load to the same logits, and compress without a gap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from serve.compression.formats import CompressedLinear
from serve.compression.recipe import Recipe
from serve.loading import LoadedModel, load

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama-tied-bias": LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, sliding_window=8),
    "mistral": MistralConfig(**SMALL, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "phi": PhiConfig(**{**SMALL, "num_key_value_heads": 4}),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save(config: PretrainedConfig, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder, **options)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 27)[None]).logits
        return found


def compressed(loaded: LoadedModel) -> set[str]:
    return {name for name, module in loaded.model.named_modules() if isinstance(module, CompressedLinear)}


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_logits_equal_those_of_the_saved_model(name: str, tmp_path: Path) -> None:
    model = save(CONFIGS[name], tmp_path)
    loaded = load(str(tmp_path), Recipe.parse("fp32"))
    torch.testing.assert_close(logits(loaded.model), logits(model), atol=1e-6, rtol=1e-5)
    assert loaded.report.parameters == sum(p.numel() for p in model.parameters())
    assert loaded.report.unused_keys == ()
    assert loaded.context_length == 64


@pytest.mark.parametrize("recipe", ["fp32+int8", "fp32+int8-weight", "fp32+nf4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_is_compressed_or_listed(name: str, recipe: str, tmp_path: Path) -> None:
    model = save(CONFIGS[name], tmp_path)
    loaded = load(str(tmp_path), Recipe.parse(recipe))
    listed = set(loaded.report.uncovered)
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    kept = embeddings | {"lm_head.weight"}
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert matrices <= {f"{name}.weight" for name in compressed(loaded)} | listed | kept
    assert loaded.report.parameters == sum(p.numel() for p in model.parameters())
    reference, found = logits(model), logits(loaded.model).float()
    tolerance = 0.35 if recipe.endswith("nf4") else 0.1
    assert (found - reference).abs().mean() < tolerance * reference.std()


def test_stacked_experts_are_listed_as_uncovered(tmp_path: Path) -> None:
    save(CONFIGS["mixtral"], tmp_path)
    uncovered = load(str(tmp_path), Recipe.parse("int8")).report.uncovered
    assert uncovered["model.layers.0.mlp.experts.gate_up_proj"] == "stacked experts"
    assert uncovered["model.layers.0.mlp.experts.down_proj"] == "stacked experts"


def test_conv1d_is_compressed_like_any_linear_layer(tmp_path: Path) -> None:
    save(CONFIGS["gpt2"], tmp_path)
    loaded = load(str(tmp_path), Recipe.parse("int8"))
    linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert compressed(loaded) == {f"transformer.h.{block}.{name}" for block in (0, 1) for name in linear}


def test_a_sharded_checkpoint_reads_like_a_whole_one(tmp_path: Path) -> None:
    model = save(CONFIGS["llama"], tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(str(tmp_path), Recipe.parse("fp32")).model), logits(model))


def test_a_base_model_checkpoint_gets_its_prefix(tmp_path: Path) -> None:
    """As on the Hub, GPT-2's file holds `h.0...` where the model has `transformer.h.0...`."""
    model = save(CONFIGS["gpt2"], tmp_path)
    model.transformer.save_pretrained(tmp_path)
    config = model.config.to_json_string().replace("GPT2Model", "GPT2LMHeadModel")
    (tmp_path / "config.json").write_text(config)
    assert torch.equal(logits(load(str(tmp_path), Recipe.parse("fp32")).model), logits(model))


def test_stored_16_bit_weights_are_read_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    assert torch.equal(logits(load(str(tmp_path), Recipe.parse("bf16")).model), logits(model))
