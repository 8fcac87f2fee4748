"""Calibration through a model that is filled block by block measures what the whole model would have seen."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from serve.compression.activations import BlockActivations, InputMeter
from serve.compression.method import Need
from serve.compression.skeleton import Skeleton, build
from serve.errors import CalibrationError

SIZES = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "qwen2": {"num_key_value_heads": 2},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
CPU = torch.device("cpu")


def _model(kind: str) -> PreTrainedModel:
    names = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64} if kind == "gpt2" else {}
    names = names or {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=50, max_position_embeddings=64, **names, **SIZES[kind])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _filled(model: PreTrainedModel) -> Skeleton:
    skeleton = build(model.config, torch.float32)
    skeleton.model.load_state_dict(model.state_dict(), assign=True)
    skeleton.model.tie_weights()
    return skeleton


def _samples() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (length,), generator=generator).tolist() for length in (20, 7, 20, 33, 1)]


@torch.no_grad()
def _inputs(model: PreTrainedModel, name: str) -> torch.Tensor:
    """Everything that the named projection reads when the ordinary model runs over the samples."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for sample in _samples():
        model(input_ids=torch.tensor([sample]))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("kind", list(SIZES))
def test_statistics_are_those_of_the_whole_model(kind: str) -> None:
    model = _model(kind)
    skeleton = _filled(model)
    activations = BlockActivations(skeleton, _samples(), CPU)
    assert activations.tokens == 81
    for block in skeleton.blocks:
        groups = activations.groups(block)
        assert sorted(name for group in groups for name in group) == sorted(
            name for name in skeleton.projections if name.startswith(f"{block}.")
        )
        firsts = [group[0] for group in groups]
        for name, measured in activations.measure(block, firsts, Need.GRAM).items():
            x = _inputs(model, name)
            assert measured.tokens == len(x)
            torch.testing.assert_close(measured.mean_abs, x.abs().mean(0))
            torch.testing.assert_close(measured.max_abs, x.abs().amax(0))
            torch.testing.assert_close(measured.mean_square, x.square().mean(0))
            assert measured.gram is not None
            torch.testing.assert_close(measured.gram, x.t() @ x / len(x))
        activations.advance(block)


def test_siblings_read_the_same_input_and_come_in_the_order_they_run() -> None:
    skeleton = _filled(_model("llama"))
    groups = BlockActivations(skeleton, _samples(), CPU).groups("model.layers.0")
    assert [[name.rpartition(".")[2] for name in group] for group in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_a_changed_block_changes_what_later_blocks_see() -> None:
    skeleton = _filled(_model("llama"))
    name = "model.layers.1.mlp.down_proj"

    def measured(change: bool) -> torch.Tensor:
        activations = BlockActivations(skeleton, _samples(), CPU)
        if change:
            skeleton.model.get_submodule("model.layers.0.mlp.down_proj").weight.data.zero_()
        activations.advance("model.layers.0")
        return activations.measure("model.layers.1", [name], Need.MOMENTS)[name].mean_abs

    assert not torch.allclose(measured(False), measured(True))


def test_the_model_is_left_as_it_was() -> None:
    model = _model("llama")
    skeleton = _filled(model)
    activations = BlockActivations(skeleton, _samples(), CPU)
    for block in skeleton.blocks:
        activations.advance(block)
    ids = torch.tensor([_samples()[0]])
    torch.testing.assert_close(skeleton.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_wide_inputs_give_a_whole_symmetric_gram_matrix() -> None:
    x = torch.randn(40, 1100, generator=torch.Generator().manual_seed(2))
    meter = InputMeter(1100, Need.GRAM)
    for part in (x[:15], x[15:15], x[15:]):
        meter.update(part)
    gram = meter.statistics().gram
    assert gram is not None
    torch.testing.assert_close(gram, x.t() @ x / 40)
    assert torch.equal(gram, gram.t())


def test_text_without_tokens_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no token"):
        BlockActivations(_filled(_model("llama")), [[]], CPU)
