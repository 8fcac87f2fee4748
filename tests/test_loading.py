"""Loading: a source and a recipe become a model that answers as it should, or one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.compression.recipe import Recipe
from serve.errors import CheckpointError, RecipeError, SetupError, UnsupportedArchitecture
from serve.loading import LoadedModel, load

PROMPT = "Once upon a time there was a little dog"


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Path:
    return shared / "models" / "TinyStories-656K"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A private copy of the small model, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o755)
    return folder


def logits(loaded: LoadedModel) -> torch.Tensor:
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        return loaded.model(ids).logits.float()


def test_fp32_gives_exactly_the_logits_of_from_pretrained(tiny: Path) -> None:
    loaded = load(str(tiny), Recipe.parse("fp32"))
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(logits(loaded), plain(ids).logits)
    assert loaded.context_length == 512
    assert loaded.eos_token_ids == (2,)


@pytest.mark.parametrize("recipe", ["bf16", "int8", "int8-weight"])
def test_compressed_logits_stay_near_the_reference(tiny: Path, recipe: str) -> None:
    reference = logits(load(str(tiny), Recipe.parse("fp32")))
    found = logits(load(str(tiny), Recipe.parse(recipe)))
    p, q = reference.log_softmax(-1), found.log_softmax(-1)
    divergence = p.exp() * (p - q)
    assert divergence.sum(-1).mean() < 0.005


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_load_right_whichever_name_the_file_holds(copy: Path, stored: str) -> None:
    before = logits(load(str(copy), Recipe.parse("fp32")))
    tensors = load_file(copy / "model.safetensors")
    tensors[stored] = tensors.pop("lm_head.weight")
    save_file(tensors, copy / "model.safetensors")
    loaded = load(str(copy), Recipe.parse("fp32"))
    assert torch.equal(logits(loaded), before)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_weight_bytes_never_rise_as_precision_falls(tiny: Path) -> None:
    recipes = ["fp32", "bf16", "int8", "int8-weight"]
    sizes = [load(str(tiny), Recipe.parse(recipe)).report.total_bytes for recipe in recipes]
    assert sizes == sorted(sizes, reverse=True)


def test_the_fingerprint_covers_the_recipe_and_the_weights(copy: Path) -> None:
    first = load(str(copy), Recipe.parse("bf16")).fingerprint
    assert load(str(copy), Recipe.parse("bf16")).fingerprint == first
    assert load(str(copy), Recipe.parse("fp32")).fingerprint != first
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, copy / "model.safetensors")
    assert load(str(copy), Recipe.parse("bf16")).fingerprint != first


def test_an_int8_head_leaves_the_tied_embedding_alone(tiny: Path) -> None:
    kept = load(str(tiny), Recipe.parse("int8"))
    loaded = load(str(tiny), Recipe.parse("int8+head8"))
    assert torch.equal(loaded.model.model.embed_tokens.weight, kept.model.model.embed_tokens.weight)
    assert loaded.report.embedding_bytes == kept.report.embedding_bytes
    assert loaded.report.weight_bytes - kept.report.weight_bytes == 2048 * 128


def test_skipped_layers_stay_dense_and_are_listed(tiny: Path) -> None:
    recipe = Recipe.parse({"stages": ["int8"], "skip": ["model.layers.0.*"]})
    loaded = load(str(tiny), recipe)
    assert isinstance(loaded.model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert not isinstance(loaded.model.model.layers[1].mlp.up_proj, torch.nn.Linear)
    assert loaded.report.uncovered["model.layers.0.mlp.up_proj.weight"] == "skipped by the recipe"


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_with_a_missing_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_leads_out(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE = [
    (truncate, "truncated or not a safetensors file"),
    (drop_a_tensor, r"lack model\.layers\.1\.mlp\.up_proj\.weight"),
    (only_a_pickle, "only safetensors are read"),
    (index_with_a_missing_shard, "is missing, though the index names it"),
    (index_that_leads_out, "leads out of the folder"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "not a configuration"),
    (lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors file"),
    (lambda folder: (folder / "model.safetensors").write_text("hello"), "not a safetensors file"),
    (lambda folder: edit_config(folder, intermediate_size=256), r"has shape .* but config\.json makes it"),
    (lambda folder: edit_config(folder, model_type="nobody-knows"), "not a configuration"),
]


@pytest.mark.parametrize(("damage", "line"), DAMAGE)
def test_a_damaged_checkpoint_gives_one_clear_line(copy: Path, damage, line: str) -> None:  # type: ignore[no-untyped-def]
    damage(copy)
    with pytest.raises(CheckpointError, match=line) as caught:
        load(str(copy), Recipe.parse("bf16"))
    assert "\n" not in caught.value.message


def test_an_encoder_is_refused_by_name(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}))
    with pytest.raises(UnsupportedArchitecture, match="CLIPModel"):
        load(str(copy), Recipe.parse("bf16"))


def test_code_that_a_checkpoint_brings_along_is_never_run(copy: Path) -> None:
    marker = copy / "ran"
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(copy, model_type="evil", auto_map=auto_map)
    with pytest.raises(CheckpointError, match="never run"):
        load(str(copy), Recipe.parse("bf16"))
    edit_config(copy, model_type="llama", auto_map=auto_map)
    load(str(copy), Recipe.parse("bf16"))
    assert not marker.exists()


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "builtin:nobody", "not a hub id"])
def test_a_source_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(CheckpointError, match=source.replace(".", r"\.")):
        load(source, Recipe.parse("bf16"))


def test_a_hub_id_without_a_network_names_the_offline_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"local folder.*cache.*builtin:storyteller"):
        load("nobody/halftone-has-no-such-model", Recipe.parse("bf16"))


def test_a_recipe_that_cannot_run_fails_before_any_weight_is_read(tiny: Path) -> None:
    with pytest.raises(SetupError):
        load(str(tiny), Recipe.parse("fp8"), device="cpu")
    with pytest.raises(RecipeError):
        load(str(tiny), Recipe.parse("int8+nf4"))
