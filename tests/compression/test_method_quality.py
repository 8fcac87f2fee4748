"""What every calibrated method reaches on a really trained model, loaded as a server would load it.

TinyStories-656K, calibrated on the first 128 stories of calib.jsonl, judged on the first 120 of eval.jsonl. At 4 bits,
groups of 64, symmetric, GPTQModel 7.7 reaches a KL divergence of 0.0498 and +4.78 % perplexity.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.compression.calibration import Calibration
from serve.compression.formats.grouped import GroupedLinear
from serve.compression.recipe import Recipe
from serve.loading import LoadedModel, load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(shared: Path) -> tuple[Path, Path]:
    return shared / "models" / "TinyStories-656K", shared / "data" / "tinystories"


@cache
def _load(model: Path, data: Path, recipe: str) -> LoadedModel:
    return load(str(model), Recipe.parse(recipe), device="cpu", calibration=Calibration(data / "calib.jsonl"))


@torch.no_grad()
def _scores(loaded: LoadedModel, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `[tokens, vocabulary]` and the true next tokens `[tokens]`."""
    lines = (data / "eval.jsonl").read_text().splitlines()[:120]
    texts = [loaded.tokenizer(json.loads(line)["text"])["input_ids"][:512] for line in lines]
    logits = [loaded.model(input_ids=torch.tensor([ids])).logits[0, :-1].float() for ids in texts]
    truth = torch.cat([torch.tensor(ids[1:]) for ids in texts])
    return torch.cat(logits).log_softmax(-1), truth


@cache
def _quality(model: Path, data: Path, recipe: str) -> tuple[float, float]:
    """Mean KL divergence from fp32 in nats per token, and the rise of perplexity as a ratio."""
    reference, truth = _reference(model, data)
    variant, _ = _scores(_load(model, data, recipe), data)
    divergence = (reference.exp() * (reference - variant)).sum(-1).mean().item()
    surprise = (reference - variant).gather(1, truth[:, None]).mean().exp().item()
    return divergence, surprise - 1


@cache
def _reference(model: Path, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return _scores(_load(model, data, "fp32"), data)


def test_the_reference_is_the_known_one(folders: tuple[Path, Path]) -> None:
    reference, truth = _reference(*folders)
    assert (-reference.gather(1, truth[:, None]).mean()).exp().item() == pytest.approx(19.116, abs=0.002)


@pytest.mark.parametrize(
    ("recipe", "kl_divergence", "perplexity_rise"),
    [("gptq4-g64-sym", 0.0498, 0.0478), ("gptq4-g64-asym", 0.040, 0.0478), ("gptq4-g64-sym-act", 0.0498, 0.0478)],
)
def test_gptq_is_no_worse_than_gptqmodel(
    folders: tuple[Path, Path], recipe: str, kl_divergence: float, perplexity_rise: float
) -> None:
    measured = _quality(*folders, f"fp32+{recipe}")
    assert measured[0] <= kl_divergence
    assert measured[1] <= perplexity_rise


@pytest.mark.parametrize("options", ["4-g64-sym", "4-g64-asym"])
def test_methods_rank_as_published(folders: tuple[Path, Path], options: str) -> None:
    gptq, awq, nearest = (_quality(*folders, f"fp32+{method}{options}")[0] for method in ("gptq", "awq", "rtn"))
    assert gptq < awq <= nearest * 1.02


@pytest.mark.parametrize("pattern", ["50", "-2:4"])
def test_pruners_rank_as_published(folders: tuple[Path, Path], pattern: str) -> None:
    sparsegpt, wanda, magnitude = (
        _quality(*folders, f"fp32+{method}{pattern}")[0] for method in ("sparsegpt", "wanda", "magnitude")
    )
    assert sparsegpt < wanda < magnitude


def test_pruned_weights_stay_zero_through_gptq(folders: tuple[Path, Path]) -> None:
    loaded = _load(*folders, "fp32+wanda-2:4+gptq4-g64")
    assert _quality(*folders, "fp32+wanda-2:4+gptq4-g64")[0] < 1.5
    for module in loaded.model.modules():
        if isinstance(module, GroupedLinear):
            weight = module._tile(module.codes, slice(0, module.out_features))
            assert (weight == 0).float().mean() > 0.49


def test_the_same_calibration_gives_the_same_numbers(folders: tuple[Path, Path]) -> None:
    first = _load(*folders, "fp32+gptq4-g64-sym")
    again = load(
        str(folders[0]),
        Recipe.parse("fp32+gptq4-g64-sym"),
        device="cpu",
        calibration=Calibration(folders[1] / "calib.jsonl"),
    )
    assert first.fingerprint == again.fingerprint
    assert first.report.calibration_tokens == again.report.calibration_tokens > 20_000
    for (name, ours), (_, theirs) in zip(first.model.named_buffers(), again.model.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_awq_saves_a_model_with_planted_outlier_channels(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Loud channels behind the norms, whose weights are as much smaller: the same function, hard to round."""
    for path in folders[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in ("model.layers.0.", "model.layers.1."):
        for norm, readers in (("input_layernorm", "qkv"), ("post_attention_layernorm", ("gate", "up"))):
            tensors[f"{layer}{norm}.weight"][5:128:40] *= 30
            for name in (f"self_attn.{r}_proj" if len(r) == 1 else f"mlp.{r}_proj" for r in readers):
                tensors[f"{layer}{name}.weight"][:, 5:128:40] /= 30
    save_file(tensors, tmp_path / "model.safetensors")
    assert _quality(tmp_path, folders[1], "fp32")[0] < 1e-6
    for options in ("4-g64-sym", "4-g64-asym"):
        awq, nearest = (_quality(tmp_path, folders[1], f"fp32+{m}{options}")[0] for m in ("awq", "rtn"))
        assert awq < 0.7 * nearest
