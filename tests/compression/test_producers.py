"""Producers: a scale folded into what makes a group's input, and taken out by the group, changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from serve.compression.activations import BlockActivations
from serve.compression.checkpoints import Checkpoint, Weights
from serve.compression.compress import compress
from serve.compression.formats import CompressedLinear, LinearSpec
from serve.compression.method import Group, InputStatistics, Need
from serve.compression.plan import Plan, Treatment
from serve.compression.recipe import Recipe
from serve.compression.skeleton import Skeleton, build
from serve.compression.source import Source

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = {"q_proj", "o_proj", "gate_proj", "down_proj"}
CONFIGS: dict[str, tuple[PretrainedConfig, set[str]]] = {
    "llama": (LlamaConfig(**SMALL), GATED),
    "llama-bias": (LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True), GATED),
    "qwen3": (Qwen3Config(**SMALL, head_dim=16), GATED),
    "gemma2": (Gemma2Config(**SMALL, head_dim=16), GATED),
    "phi": (PhiConfig(**{**SMALL, "num_key_value_heads": 4}), {"q_proj"}),  # one norm feeds attention and MLP
    "opt": (
        OPTConfig(
            vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=64, max_position_embeddings=64,
        ),
        {"q_proj", "out_proj", "fc1"},
    ),
    "gpt2": (GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64), {"c_attn", "c_fc"}),
    "mixtral": (MixtralConfig(**SMALL, num_local_experts=4), {"q_proj", "o_proj"}),
}  # fmt: skip


class Plain(CompressedLinear):
    """A layer that stores what it is given."""

    kernel = "plain"
    weight: Tensor

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.declare("weight", (spec.out_features, spec.in_features), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    reference = forward

    def dequantize(self) -> Tensor:
        return self.weight


class Folding:
    """Scales every group's inputs at random, and its producer by the inverse."""

    needs = Need.MOMENTS
    sequential = False

    def __init__(self) -> None:
        self.folded: set[str] = set()

    def check(self, device: torch.device, dtype: torch.dtype) -> None: ...

    def shell(self, spec: LinearSpec) -> CompressedLinear:
        return Plain(spec)

    def quantize(self, group: Group, statistics: InputStatistics | None) -> list[CompressedLinear]:
        factor = torch.ones(1)
        if group.producer is not None:
            scale = torch.rand(group.producer.channels) + 0.5
            group.producer.divide(scale)
            factor = group.producer.spread(scale)
            self.folded.add(group.projections[0].name.rsplit(".", 1)[-1])
        layers = []
        for projection in group.projections:
            layer = self.shell(projection.spec)
            layer.fill(weight=projection.weight * factor, bias=projection.bias)
            layers.append(layer)
        return layers


@pytest.mark.parametrize("name", CONFIGS)
def test_folding_a_scale_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, expected = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # norms of all ones would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    source = Source.find(str(tmp_path))
    skeleton: Skeleton = build(source.config, torch.float32)
    folding = Folding()
    plan = Plan(Recipe.parse("fp32"), torch.device("cpu"))
    monkeypatch.setattr(plan, "treatment", lambda name: Treatment(quantizer=folding))
    activations = BlockActivations(skeleton, [[3, 4, 5, 6, 7]], torch.device("cpu"))
    compress(skeleton, Weights(Checkpoint.open(source), skeleton.model), plan, activations=activations)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        torch.testing.assert_close(skeleton.model(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-4)
    assert folding.folded == expected
