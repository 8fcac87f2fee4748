"""A cut model is an ordinary smaller one, and cutting what did nothing changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from serve.compression.calibration import Calibration
from serve.compression.recipe import Recipe
from serve.compression.sizes import between, cut_config
from serve.compression.stages import Depth, Structured
from serve.errors import RecipeError, UnsupportedArchitecture
from serve.loading import LoadedModel, load
from serve.saving import compress_to


def _config(**changes: object) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(
        **{"num_hidden_layers": 3, "vocab_size": 2048, "max_position_embeddings": 64, **sizes, **changes}
    )


@pytest.fixture
def folder(tmp_path: Path, shared: Path) -> Path:
    """A model whose second layer is idle, as are a key-value head and half of the channels of the others."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config()).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 16:] = 0
            layer.mlp.down_proj.weight[:, ::2] = 0
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    return _save(model, tmp_path / "model", shared)


def _save(model: PreTrainedModel, folder: Path, shared: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((shared / "models" / "TinyStories-656K" / name).read_bytes())
    return folder


def _load(folder: Path, recipe: str, shared: Path, artifacts: Path | None = None) -> LoadedModel:
    calibration = Calibration(shared / "data" / "tinystories" / "calib.jsonl", num_samples=4)
    return load(str(folder), Recipe.parse(recipe), device="cpu", calibration=calibration, artifacts=artifacts)


@torch.no_grad()
def _logits(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.randint(0, 2048, (2, 20), generator=torch.Generator().manual_seed(3))
    return loaded.model(input_ids=ids).logits


def test_idle_heads_and_channels_go_and_nothing_changes(folder: Path, shared: Path) -> None:
    cut = _load(folder, "fp32+structured50", shared)
    config = cut.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 48)
    assert cut.model.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    torch.testing.assert_close(_logits(cut), _logits(_load(folder, "fp32", shared)), atol=1e-4, rtol=1e-4)


def test_the_idle_layer_goes_and_nothing_changes(folder: Path, shared: Path) -> None:
    cut = _load(folder, "fp32+depth33", shared)
    assert len(cut.model.model.layers) == cut.model.config.num_hidden_layers == 2
    torch.testing.assert_close(_logits(cut), _logits(_load(folder, "fp32", shared)), atol=1e-5, rtol=1e-5)


def test_both_cuts_in_one_recipe_are_both_made(folder: Path, shared: Path) -> None:
    cut = _load(folder, "fp32+depth33+structured50", shared)
    assert (cut.model.config.num_hidden_layers, cut.model.config.intermediate_size) == (2, 48)
    torch.testing.assert_close(_logits(cut), _logits(_load(folder, "fp32", shared)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["structured50+gptq4-g16", "depth33+int8", "structured25+wanda50"])
def test_later_stages_work_on_what_is_left_and_artifacts_hold_it(
    recipe: str, folder: Path, shared: Path, tmp_path: Path
) -> None:
    made = _load(folder, f"fp32+{recipe}", shared, tmp_path / "store")
    again = _load(folder, f"fp32+{recipe}", shared, tmp_path / "store")
    assert not made.report.artifact_hit
    assert again.report.artifact_hit
    assert torch.equal(_logits(made), _logits(again))
    whole = sum(p.numel() for p in _load(folder, "fp32", shared).model.parameters())
    assert made.report.parameters < whole
    for report in (made.report, again.report):  # against the model that was cut
        assert report.compression_ratio_fp32 == pytest.approx(4 * whole / report.total_bytes)


def test_an_exported_folder_is_a_source_of_the_cut_size(folder: Path, shared: Path, tmp_path: Path) -> None:
    calibration = Calibration(shared / "data" / "tinystories" / "calib.jsonl", num_samples=4)
    recipe = Recipe.parse("fp32+structured50")
    compress_to(str(folder), recipe, tmp_path / "out", calibration=calibration, device="cpu")
    exported = load(str(tmp_path / "out"), recipe, device="cpu")
    assert torch.equal(_logits(exported), _logits(_load(folder, "fp32+structured50", shared)))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize(
    "config",
    [
        _config(hidden_size=128, intermediate_size=384, num_attention_heads=8, num_key_value_heads=4),
        _config(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4),
        AutoConfig.for_model(
            "qwen3", hidden_size=96, intermediate_size=640, num_attention_heads=6, num_key_value_heads=3, head_dim=32
        ),
    ],
    ids=["tinystories", "bench", "qwen3"],
)
def test_the_share_of_weights_goes_and_the_configuration_stays_valid(config: PretrainedConfig, share: float) -> None:
    def weights(config: PretrainedConfig) -> int:
        groups = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
        return config.hidden_size * (config.head_dim * groups + 3 * config.intermediate_size)

    smaller = cut_config(config, Structured(share=share))
    smaller.validate()
    assert 1 - weights(smaller) / weights(config) == pytest.approx(share, abs=0.06)
    assert smaller.head_dim == config.head_dim


def test_depth_keeps_the_share_of_layers() -> None:
    assert cut_config(_config(num_hidden_layers=12), Depth(share=0.25)).num_hidden_layers == 9
    with pytest.raises(RecipeError, match="not one"):
        cut_config(_config(num_hidden_layers=1), Depth(share=0.25))


def test_on_the_way_to_a_size_heads_go_as_soon_as_a_possible_number_is_near() -> None:
    """Of 8 query heads on 128 numbers only 4 or 2 can be left: they must not all wait for the last step."""
    config = LlamaConfig(hidden_size=128, intermediate_size=384, num_attention_heads=8, num_key_value_heads=4)
    goal = cut_config(config, Structured(share=0.5))
    sizes = [between(config, goal, fraction) for fraction in (1 / 3, 2 / 3, 1)]
    assert [size.num_attention_heads for size in sizes] == [8, 4, 4]
    assert [size.intermediate_size for size in sizes] == [320, 256, 192]
    assert sizes[-1].to_dict() == goal.to_dict()


def test_what_cannot_be_cut_is_refused(folder: Path, tmp_path: Path, shared: Path) -> None:
    mixed = AutoConfig.for_model("gemma3_text", num_hidden_layers=6)
    with pytest.raises(RecipeError, match="different kinds"):
        cut_config(mixed, Depth(share=0.5))
    with pytest.raises(RecipeError, match="intermediate_size"):
        cut_config(GPT2Config(), Structured(share=0.25))
    with pytest.raises(RecipeError, match="whole model"):
        load(str(folder), Recipe.parse({"stages": ["bf16"], "overrides": {"*.0.*": "depth25"}}))
    phi = AutoConfig.for_model(
        "phi3", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=2048,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    fused = _save(AutoModelForCausalLM.from_config(phi), tmp_path / "phi", shared)
    with pytest.raises(UnsupportedArchitecture, match="depth pruning"):
        _load(fused, "structured25", shared)
