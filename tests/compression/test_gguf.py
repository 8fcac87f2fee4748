"""GGUF files: read back by the gguf package's own reader, and by llama.cpp where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from serve.compression.calibration import Calibration
from serve.compression.export.gguf_blocks import block_type, to_blocks
from serve.compression.export.gguf_vocabulary import read_vocabulary
from serve.compression.formats.grouped import GroupedLinear
from serve.compression.formats.integer_grid import IntegerGrid
from serve.compression.formats.linear import LinearSpec
from serve.compression.methods.rtn import round_to_nearest
from serve.compression.recipe import Recipe
from serve.errors import CheckpointError, RecipeError, UnsupportedArchitecture
from serve.loading import load
from serve.quality import model_logits, perplexity, read_texts, tokenize
from serve.saving import compress_to

LLAMA_CPP = Path(os.environ.get("HALFTONE_PEERS", Path(__file__).parents[2] / ".peers")) / "llama.cpp/bin/python"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tiny(shared: Path) -> str:
    return str(shared / "models" / "TinyStories-656K")


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))


def unrotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's rows, where a head's pairs are neighbours, as transformers has them: first halves, second halves."""
    rows = [weight[head * len(weight) // heads :][: len(weight) // heads] for head in range(heads)]
    return torch.cat([torch.cat([row[0::2], row[1::2]]) for row in rows])


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [("int8", "Q8_0"), ("int8-weight", "Q8_0"), ("rtn8-g64", "Q8_0"), ("rtn4", "Q4_0"), ("rtn4-g32-asym", "Q4_1")],
)
def test_the_file_holds_the_very_values_that_we_serve(tiny: str, tmp_path: Path, recipe: str, kind: str) -> None:
    file = tmp_path / "model.gguf"
    compress_to(tiny, Recipe.parse(f"fp32+{recipe}"), file, format="gguf")
    compress_to(tiny, Recipe.parse(f"fp32+{recipe}"), tmp_path / "ours")
    ours = load(str(tmp_path / "ours"), Recipe.parse("fp32")).model  # prepared for this machine: ask the artifact
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert "output.weight" not in tensors  # the head is the embedding
    torch.testing.assert_close(values(tensors["token_embd.weight"]), ours.model.embed_tokens.weight.float())
    eye = torch.eye(128)
    for name, theirs, heads in (("self_attn.q_proj", "attn_q", 8), ("self_attn.k_proj", "attn_k", 4)):
        assert tensors[f"blk.1.{theirs}.weight"].tensor_type == GGMLQuantizationType[kind]
        layer = ours.get_submodule(f"model.layers.1.{name}")
        found = unrotated(values(tensors[f"blk.1.{theirs}.weight"]), heads)
        torch.testing.assert_close(found, layer(eye).t(), atol=0.012 * float(found.abs().max()), rtol=0)
    down = ours.get_submodule("model.layers.0.mlp.down_proj")
    found = values(tensors["blk.0.ffn_down.weight"])
    torch.testing.assert_close(found, down(torch.eye(384)).t(), atol=0.012 * float(found.abs().max()), rtol=0)


@pytest.mark.parametrize("columns", [64, 96, 160])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_blocks_are_the_integers_themselves(bits: int, symmetric: bool, columns: int) -> None:
    spec = LinearSpec("layer", columns, 10, False, torch.float32)
    weight = torch.randn(10, columns, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(weight, IntegerGrid(bits, 64, symmetric), dtype=torch.float16)
    layer = GroupedLinear.from_weight(spec, type(rounded)(**{**vars(rounded), "scales": rounded.scales.float()}))
    blocks, order = to_blocks(layer, torch.arange(9, -1, -1)), torch.arange(9, -1, -1)
    found = dequantize(blocks.data.numpy(), GGMLQuantizationType[blocks.type])
    exact = rounded.dequantize(torch.float64)[order]
    tolerance = 0.0 if symmetric else 1e-3 * float(exact.abs().max())  # only the offset of Q4_1 is rounded
    torch.testing.assert_close(torch.from_numpy(found).double(), exact, atol=tolerance + 1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("nf4", "GGUF holds"), ("rtn3", "3 bits"), ("rtn8-asym", "8 bits, asymmetric"), ("gptq4-act", "order"),
        ("rtn4-g8", "multiple"), ("wanda50", "GGUF holds"), ("mixed4.5", "mixed"), ("int8-static", "GGUF holds"),
    ],
)  # fmt: skip
def test_what_gguf_cannot_hold_is_refused_before_any_work(tiny: str, tmp_path: Path, recipe: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        compress_to(tiny, Recipe.parse(recipe), tmp_path / "model.gguf", format="gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_inputs_that_do_not_divide_into_blocks_name_the_layer() -> None:
    spec = LinearSpec("model.layers.3.o_proj", 40, 4, False, torch.float32)
    with pytest.raises(RecipeError, match=r"layers\.3\.o_proj: its 40 inputs"):
        block_type(GroupedLinear(spec, IntegerGrid(4, 32)))


def byte_level(*splitting: Any) -> PreTrainedTokenizerFast:
    alphabet = {character: number for number, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=alphabet | {"ab": len(alphabet)}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(splitting))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_rules_that_llama_cpp_knows_get_its_name_and_others_are_refused() -> None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = read_vocabulary(byte_level(plain), 300)
    assert (found.kind, found.rule, found.merges) == ("gpt2", "gpt-2", ["a b"])
    assert len(found.tokens) == len(found.types) == 300
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert read_vocabulary(byte_level(digits, plain), 300).rule == "smollm"
    with pytest.raises(CheckpointError, match="no rule that splits"):
        read_vocabulary(byte_level(pre_tokenizers.Punctuation(), plain), 300)
    with pytest.raises(CheckpointError, match="only 10 embeddings"):
        read_vocabulary(byte_level(plain), 10)


def test_a_structurally_pruned_model_is_written_at_its_own_size(tiny: str, shared: Path, tmp_path: Path) -> None:
    calibration = Calibration(shared / "data" / "tinystories" / "calib.jsonl", num_samples=2)
    recipe = Recipe.parse("structured25+rtn4-g32")
    compress_to(tiny, recipe, tmp_path / "cut.gguf", format="gguf", calibration=calibration)
    reader = GGUFReader(tmp_path / "cut.gguf")
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    width = reader.fields["llama.feed_forward_length"].contents()
    assert shapes["blk.0.ffn_gate.weight"] == [128, width]
    assert width < 384


def other(kind: str, folder: Path, shared: Path) -> str:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 2048, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    rope = {}
    if kind == "llama3":
        rope = {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }}  # fmt: skip
    name = "llama" if kind == "llama3" else kind
    bias = {"attention_bias": True} if kind == "llama3" else {}
    config = AutoConfig.for_model(name, **sizes, **heads, **rope, **bias, tie_word_embeddings=False, bos_token_id=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() < 2 else 0.15)
    model.save_pretrained(folder)
    for path in (shared / "models" / "TinyStories-656K").glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


def test_architectures_that_are_not_known_are_refused_by_name(shared: Path, tmp_path: Path) -> None:
    source = other("gemma2", tmp_path / "model", shared)
    with pytest.raises(UnsupportedArchitecture, match="Gemma2ForCausalLM"):
        compress_to(source, Recipe.parse("int8"), tmp_path / "model.gguf", format="gguf")


READ = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=128, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
texts = json.loads(sys.argv[2])
ids = [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
model.eval(ids[0][:100])
logits = [[float(x) for x in row] for row in model.scores[: model.n_tokens]]
print(json.dumps({"ids": ids, "logits": logits, "text": model.detokenize(ids[0]).decode()}))
"""


def run_llama_cpp(script: str, *arguments: Path | str) -> Any:
    if not LLAMA_CPP.exists() or subprocess.run([LLAMA_CPP, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip(f"no llama.cpp in {LLAMA_CPP.parents[1]}")
    done = subprocess.run([LLAMA_CPP, "-c", script, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


TEXTS = ["Once upon a time, there was a little dog named Max. He liked to run in the park.", "Tom said: hi!\nBye 12"]


@pytest.mark.parametrize("source", ["tiny", "builtin:storyteller", "llama3", "qwen2", "qwen3", "mistral"])
def test_llama_cpp_gives_the_same_ids_and_logits(source: str, shared: Path, tmp_path: Path) -> None:
    """Not part of the locked environment; skipped where llama-cpp-python is not installed (`HALFTONE_PEERS`)."""
    if source == "tiny":
        source = str(shared / "models" / "TinyStories-656K")
    elif not source.startswith("builtin:"):
        source = other(source, tmp_path / "source", shared)
    for recipe, tolerance in (("fp32", 0.01), ("fp32+int8", 0.03), ("fp32+rtn4-g32", 0.03)):
        file = tmp_path / f"{recipe}.gguf"
        compress_to(source, Recipe.parse(recipe), file, format="gguf")
        found = run_llama_cpp(READ, file, json.dumps(TEXTS))
        ours = load(source, Recipe.parse(recipe))
        assert found["ids"] == [list(ours.tokenizer(text).input_ids) for text in TEXTS]
        with torch.no_grad():
            expected = ours.model(torch.tensor([found["ids"][0][:100]])).logits[0].float()
        difference = (torch.tensor(found["logits"]) - expected).square().mean().sqrt()
        assert difference < tolerance * expected.std(), recipe  # llama.cpp rounds activations to 8 bits


SCORE = """
import json, sys
import numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
loss, tokens = 0.0, 0
for ids in json.load(open(sys.argv[2])):
    model.reset()
    model.eval(ids)
    rows = model.scores[: len(ids) - 1].astype(np.float64)
    rows -= rows.max(1, keepdims=True)
    loss += float((np.log(np.exp(rows).sum(1)) - rows[np.arange(len(rows)), ids[1:]]).sum())
    tokens += len(rows)
print(json.dumps(float(np.exp(loss / tokens))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp32", "fp32+int8-weight", "fp32+rtn4-g32", "fp32+gptq4-g32"])
def test_llama_cpp_finds_the_perplexity_that_we_find(recipe: str, tiny: str, shared: Path, tmp_path: Path) -> None:
    """F32, Q8_0 and Q4_0; the last one holds what GPTQ chose."""
    stories = shared / "data" / "tinystories"
    calibration = Calibration(stories / "calib.jsonl", num_samples=16)
    file = tmp_path / "model.gguf"
    compress_to(tiny, Recipe.parse(recipe), file, format="gguf", calibration=calibration)
    ours = load(tiny, Recipe.parse(recipe), calibration=calibration)
    records = tokenize(ours.tokenizer, read_texts(stories / "eval.jsonl", 20), ours.context_length)
    (tmp_path / "records.json").write_text(json.dumps(records))
    found = run_llama_cpp(SCORE, file, tmp_path / "records.json")
    expected = perplexity(model_logits(ours.model), records).value
    print(f"{recipe}: llama.cpp {found:.3f}, ours {expected:.3f}")
    assert found == pytest.approx(expected, rel=0.005)
