"""Checkpoints that others compressed are read as they are, and what we write is read back to the same logits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from serve.compression.calibration import Calibration
from serve.compression.export.gptq import _gptq_tensors, _pack
from serve.compression.foreign import _unpack
from serve.compression.formats.integer_grid import GroupedWeight, IntegerGrid
from serve.compression.methods.rtn import round_to_nearest
from serve.compression.recipe import Recipe
from serve.errors import ArtifactError, CheckpointError, RecipeError
from serve.loading import LoadedModel, load
from serve.quality import compare, model_logits, read_texts, tokenize
from serve.saving import compress_to


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tiny(shared: Path) -> Path:
    return shared / "models" / "TinyStories-656K"


@pytest.fixture
def theirs(shared: Path) -> Path:
    return shared / "models" / "TinyStories-656K-gptq-g64"


@pytest.fixture
def calibration(shared: Path) -> Calibration:
    return Calibration(shared / "data" / "tinystories" / "calib.jsonl", num_samples=4, max_tokens=64)


def logits(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = loaded.model(torch.arange(3, 60)[None]).logits
        return found


def assert_near(found: LoadedModel, expected: LoadedModel) -> None:
    """The same numbers but for the roundings of 16-bit scales and activations."""
    a, b = logits(found).float(), logits(expected).float()
    assert (a - b).abs().mean() < 0.012 * b.std()


@pytest.mark.slow
def test_the_gptqmodel_checkpoint_has_its_published_divergence(shared: Path, tiny: Path, theirs: Path) -> None:
    reference, variant = load(str(tiny), Recipe.parse("fp32")), load(str(theirs), Recipe.parse("bf16"))
    texts = read_texts(shared / "data" / "tinystories" / "eval.jsonl", 120)
    records = tokenize(reference.tokenizer, texts, reference.context_length)
    found = compare(model_logits(reference.model), model_logits(variant.model), records)
    assert found.kl_divergence.mean == pytest.approx(0.0498, rel=0.02)
    assert (variant.recipe.name, variant.recipe.precision) == ("gptq4-g64", "gptq4")
    assert 4.2 < variant.report.bits_per_weight < 4.3


def test_a_compressed_checkpoint_is_served_as_it_is_or_not_at_all(theirs: Path) -> None:
    assert torch.equal(
        logits(load(str(theirs), Recipe.parse("gptq4-g64"))), logits(load(str(theirs), Recipe.parse("bf16")))
    )
    for recipe in ("int8", "gptq4", "wanda50", "bf16+head8"):
        with pytest.raises(RecipeError, match="already"):
            load(str(theirs), Recipe.parse(recipe))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_hold_codes_without_a_spare_bit(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8)
    words = _pack(codes, bits)
    assert words.shape == (5, 64 * bits // 32)
    assert torch.equal(_unpack(words, bits), codes)


RECIPES = ["rtn4-g32", "rtn4-g64-asym", "rtn3-g32", "rtn8-g64-asym", "gptq4-g32-act", "gptq4-g32-asym-act"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_exported_checkpoint_gives_the_same_logits(
    tiny: Path, tmp_path: Path, calibration: Calibration, recipe: str
) -> None:
    out = tmp_path / "out"
    report = compress_to(str(tiny), Recipe.parse(recipe), out, format="gptq", calibration=calibration)
    ours = load(str(tiny), Recipe.parse(recipe), calibration=calibration)
    found = load(str(out), Recipe.parse("bf16"))
    assert_near(found, ours)
    assert found.recipe.quantizer is not None
    assert report.recipe == recipe
    assert found.tokenizer("One day").input_ids == ours.tokenizer("One day").input_ids
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


def by_specification(tensors: dict[str, Tensor], bits: int, zero_offset: int) -> Tensor:
    """AutoGPTQ's format in float64, from its words read as one long little-endian integer: `[out, in]`."""

    def codes(words: Tensor) -> Tensor:  # int32 [rows, words]
        rows = [int.from_bytes(row.numpy().tobytes(), "little") for row in words.contiguous()]
        count = words.shape[1] * 32 // bits
        return torch.tensor([[row >> (bits * k) & (2**bits - 1) for k in range(count)] for row in rows])

    weight = codes(tensors["qweight"].t())
    zeros = codes(tensors["qzeros"])[:, : weight.shape[0]] + zero_offset
    group = tensors["g_idx"].long()
    return (weight - zeros.t()[:, group]).double() * tensors["scales"].double().t()[:, group]


@pytest.mark.parametrize(("recipe", "bits", "zero_offset"), [
    ("rtn4-g64", 4, 1), ("rtn4-g64-asym", 4, 0), ("rtn3-g32", 3, 1), ("rtn8-g32", 8, 1), ("gptq4-g32-asym-act", 4, 0),
    ("gptq2-g32", 2, 1),
])  # fmt: skip
def test_an_independent_decoder_of_the_format_gives_transformers_the_same_logits(
    tiny: Path, tmp_path: Path, calibration: Calibration, recipe: str, bits: int, zero_offset: int
) -> None:
    out = tmp_path / "out"
    compress_to(str(tiny), Recipe.parse(f"fp32+{recipe}"), out, format="gptq", calibration=calibration)
    config = json.loads((out / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert settings["checkpoint_format"] == ("gptq" if zero_offset else "gptq_v2")
    shards = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: value for file in set(shards.values()) for name, value in load_file(out / file).items()}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        own = {key: tensors.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")}
        tensors[f"{name}.weight"] = by_specification(own, bits, zero_offset).float()
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    with torch.no_grad():
        expected = model(torch.arange(3, 60)[None]).logits
    ours = logits(load(str(tiny), Recipe.parse(f"fp32+{recipe}"), calibration=calibration))
    assert (ours - expected).abs().mean() < 2e-3 * expected.std()  # scales are fp16 in the file


READ = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=128, max_num_seqs=1)
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=5)
    answer = model.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], settings)[0]
    found = [{int(k): v.logprob for k, v in place.items()} for place in answer.prompt_logprobs if place]
    print("RESULT" + json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_reads_what_we_export(tmp_path: Path, calibration: Calibration) -> None:
    """Not part of the locked environment, and takes minutes: only where `HALFTONE_PEERS` names a folder with vLLM."""
    vllm = Path(os.environ.get("HALFTONE_PEERS", "")) / "vllm/bin/python"
    if "HALFTONE_PEERS" not in os.environ or not vllm.exists():
        pytest.skip("HALFTONE_PEERS names no folder with vLLM")
    ids, out = [1, 400, 410, 500, 600, 700, 300, 290, 450, 333, 800, 900], tmp_path / "out"
    compress_to("builtin:storyteller", Recipe.parse("gptq4-g64"), out, format="gptq", calibration=calibration)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    (tmp_path / "read.py").write_text(READ)  # vLLM starts its engine in a process that imports the script again
    arguments = [vllm, tmp_path / "read.py", str(out), json.dumps(ids)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
    line = next(line for line in done.stdout.splitlines() if "RESULT" in line)
    found = json.loads(line.partition("RESULT")[2])
    with torch.no_grad():
        ours = load(str(out), Recipe.parse("fp32")).model(torch.tensor([ids])).logits[0].log_softmax(-1)
    differences = [abs(ours[n, int(k)].item() - value) for n, place in enumerate(found) for k, value in place.items()]
    assert sum(differences) / len(differences) < 0.06  # bf16 activations and logits
    assert max(differences) < 0.3


READ_BY_GPTQMODEL = """
import json, sys
import torch
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16).model
with torch.no_grad():
    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits[0].float()
kernels = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight")})
print("RESULT" + json.dumps({"logits": logits.tolist(), "kernels": kernels}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", ["gptq4-g64", "gptq4-g32-asym-act"])
def test_gptqmodel_reads_what_we_export(tmp_path: Path, calibration: Calibration, recipe: str) -> None:
    """Not part of the locked environment, whose torch is too old for it: docs/COMPRESSION.md says how to install it."""
    gptqmodel = Path(os.environ.get("HALFTONE_PEERS", "")) / "gptqmodel/bin/python"
    if "HALFTONE_PEERS" not in os.environ or not gptqmodel.exists():
        pytest.skip("HALFTONE_PEERS names no folder with GPTQModel")
    ids, out = [1, 400, 410, 500, 600, 700, 300, 290, 450, 333, 800, 900], tmp_path / "out"
    compress_to("builtin:storyteller", Recipe.parse(recipe), out, format="gptq", calibration=calibration)
    arguments = [gptqmodel, "-c", READ_BY_GPTQMODEL, str(out), json.dumps(ids)]
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "4"}  # on two cores its default is none
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
    line = next(line for line in done.stdout.splitlines() if "RESULT" in line)
    found = json.loads(line.partition("RESULT")[2])
    assert found["kernels"] == ["TorchLinear"]  # quantized, and not dequantized behind our back
    theirs = torch.tensor(found["logits"])
    with torch.no_grad():
        exact = load(str(out), Recipe.parse("fp32")).model(torch.tensor([ids])).logits[0]
        ours = load(str(out), Recipe.parse("bf16")).model(torch.tensor([ids])).logits[0].float()
    noise = (ours - exact).square().mean().sqrt()  # what bf16 alone makes of these very weights
    assert (theirs - exact).square().mean().sqrt() < 2 * noise
    assert torch.equal(theirs.argmax(-1), exact.argmax(-1))


def test_a_cut_model_and_skipped_layers_are_exported_as_they_are(
    tiny: Path, tmp_path: Path, calibration: Calibration
) -> None:
    recipe = Recipe.parse({"stages": ["structured50", "rtn4-g32"], "skip": ["model.layers.0.*"]})
    compress_to(str(tiny), recipe, tmp_path / "out", format="gptq", calibration=calibration)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] < 384
    assert all(rule.startswith("-:^model") for rule in config["quantization_config"]["dynamic"])
    found = load(str(tmp_path / "out"), Recipe.parse("bf16"))
    assert_near(found, load(str(tiny), recipe, calibration=calibration))
    mixed = Recipe.parse({"stages": ["rtn4"], "overrides": {"*.0.*": "rtn8"}})
    with pytest.raises(RecipeError, match="overrides"):
        compress_to(str(tiny), mixed, tmp_path / "mixed", format="gptq")


def test_activation_order_puts_columns_back_in_their_places() -> None:
    grid = IntegerGrid(4, 8, symmetric=True)
    weight = round_to_nearest(torch.randn(6, 32), grid)
    order = torch.randperm(32)
    shuffled = GroupedWeight(grid, weight.codes, weight.scales, None, order)
    tensors = _gptq_tensors(shuffled)
    codes = _unpack(tensors["qweight"].t().contiguous(), 4).float() - 8
    decoded = codes * weight.scales.t()[:, tensors["g_idx"].long()]
    torch.testing.assert_close(decoded, shuffled.dequantize())


def test_recipes_that_the_format_cannot_hold_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="gptq format"):
        compress_to(str(tiny), Recipe.parse("nf4"), tmp_path / "out", format="gptq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["int8", "nf4", "rtn4-g32-asym+head8"])
def test_a_folder_of_ours_is_a_source_like_any_other(tiny: Path, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "out"
    report = compress_to(str(tiny), Recipe.parse(recipe), out)
    found = load(str(out), Recipe.parse("bf16"))
    ours = load(str(tiny), Recipe.parse(recipe))
    assert torch.equal(logits(found), logits(ours))
    assert (found.recipe, found.fingerprint) == (ours.recipe, ours.fingerprint)
    assert found.report.total_bytes == report.total_bytes
    assert torch.equal(logits(load(str(out), Recipe.parse(recipe))), logits(ours))
    with pytest.raises(RecipeError, match="already holds"):
        load(str(out), Recipe.parse("gptq4"))
    with pytest.raises(ArtifactError, match="exists already"):
        compress_to(str(tiny), Recipe.parse(recipe), out)


def rewrite(tiny: Path, folder: Path, settings: dict[str, Any], replace: Any) -> None:
    """A copy of the small model whose projections `replace(name, weight)` has turned into other tensors."""
    shutil.copytree(tiny, folder)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o755)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{key}": value for key, value in replace(tensors.pop(name)).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def awq_words(codes: Tensor) -> Tensor:
    """AutoAWQ's packing: nibble i of a word holds neighbour (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    eights = codes.view(codes.shape[0], -1, 8).long()
    words = sum(eights[:, :, e] << (4 * i) for i, e in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    assert isinstance(words, Tensor)
    return words.to(torch.int32)


def test_awq_checkpoints_are_read(tiny: Path, tmp_path: Path) -> None:
    grid = IntegerGrid(4, 64, symmetric=False)

    def replace(weight: Tensor) -> dict[str, Tensor]:
        rounded = round_to_nearest(weight, grid, dtype=torch.bfloat16)
        assert rounded.zero_points is not None
        return {
            "qweight": awq_words(rounded.codes.t().contiguous()),
            "qzeros": awq_words(rounded.zero_points),
            "scales": rounded.scales.to(torch.float16),
        }

    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    rewrite(tiny, tmp_path / "awq", settings, replace)
    found = load(str(tmp_path / "awq"), Recipe.parse("bf16"))
    assert found.recipe.name == "awq4-g64-asym"
    assert torch.equal(logits(found), logits(load(str(tiny), Recipe.parse("rtn4-g64-asym"))))


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_nf4_checkpoints_are_read(tiny: Path, tmp_path: Path, double: bool) -> None:
    import bitsandbytes

    def replace(weight: Tensor) -> dict[str, Tensor]:
        layer = bitsandbytes.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compress_statistics=double
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.float(), requires_grad=False, quant_type="nf4", compress_statistics=double
        ).to("cpu")
        return dict(layer.state_dict())

    settings = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
    }  # fmt: skip
    rewrite(tiny, tmp_path / "bnb", settings, replace)
    found = load(str(tmp_path / "bnb"), Recipe.parse("bf16"))
    expected = load(str(tiny), Recipe.parse("nf4-dq" if double else "nf4"))
    assert found.recipe == Recipe.parse("nf4-dq" if double else "nf4")
    assert torch.equal(logits(found), logits(expected))


def test_bitsandbytes_int8_checkpoints_are_served_as_int8(tiny: Path, tmp_path: Path) -> None:
    def replace(weight: Tensor) -> dict[str, Tensor]:
        absmax = weight.float().abs().amax(1)
        return {"weight": (weight / absmax[:, None] * 127).round().to(torch.int8), "SCB": absmax}

    rewrite(tiny, tmp_path / "bnb", {"quant_method": "bitsandbytes", "load_in_8bit": True}, replace)
    found = load(str(tmp_path / "bnb"), Recipe.parse("fp32"))
    assert found.recipe == Recipe.parse("fp32+int8")
    p, q = logits(load(str(tiny), Recipe.parse("fp32"))).log_softmax(-1), logits(found).log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.005


def test_unknown_compression_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    rewrite(tiny, tmp_path / "model", {"quant_method": "quip"}, lambda weight: {"weight": weight})
    with pytest.raises(CheckpointError, match="'quip'"):
        load(str(tmp_path / "model"), Recipe.parse("bf16"))
