"""The model that every engine computes: Llama's architecture, 283 M parameters, random bf16 weights from a fixed seed.

Large enough that a step is bound by memory (464 MB of weights are read per token in bf16), small enough that eleven
copies fit one machine. Untied, with GPT-2's tokenizer, so that a server can answer with it as well.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from loadtest.errors import InputError
from loadtest.results import Json

SEED = 20_260_725
DEVIATION = 0.02
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
END_OF_TEXT = 50_256


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a step."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 16
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 50_257
    context: int = 4096

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Of all layers' matrices: every token multiplies with each once."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Of the output head, which only tokens that need logits multiply with."""
        return self.hidden * self.vocabulary

    def kv_bytes(self, tokens: float, bytes_per_value: int = 2) -> float:
        """Keys and values of so many tokens of one sequence."""
        return tokens * self.layers * 2 * self.kv_heads * self.head_dim * bytes_per_value

    def config(self) -> Json:
        """As transformers writes it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
            "torch_dtype": "bfloat16",
        }

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        """Of a model that `build` made."""
        config = json.loads((folder / "config.json").read_text())
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            vocabulary=config["vocab_size"],
            context=config["max_position_embeddings"],
        )

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and `[out, in]` of every weight matrix, in the order in which they are drawn."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.self_attn.q_proj.weight", (queries, self.hidden)
            yield f"{at}.self_attn.k_proj.weight", (keys, self.hidden)
            yield f"{at}.self_attn.v_proj.weight", (keys, self.hidden)
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, queries)
            yield f"{at}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{at}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def norms(self) -> Iterator[str]:
        """Names of the vectors of ones."""
        for layer in range(self.layers):
            yield f"model.layers.{layer}.input_layernorm.weight"
            yield f"model.layers.{layer}.post_attention_layernorm.weight"
        yield "model.norm.weight"


def build(folder: Path, tokenizer: Path, shape: Shape | None = None) -> Shape:
    """Makes the model's folder, or takes the one that is there; its shape. InputError where the tokenizer is not."""
    if (folder / "model.safetensors").exists():
        return Shape.read(folder)
    shape = shape or Shape()
    missing = [name for name in TOKENIZER_FILES if not (tokenizer / name).is_file()]
    if missing:
        raise InputError(f"{tokenizer}: GPT-2's tokenizer lacks {', '.join(missing)}; name its folder with --tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    about = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": shape.context, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    aside = folder / "model.safetensors.partial"
    with aside.open("wb") as file:
        _write(file, shape)
    aside.rename(folder / "model.safetensors")
    return shape


def _write(file: BinaryIO, shape: Shape) -> None:
    """safetensors' form: the header's length, the header, the values one after another."""
    sizes: dict[str, tuple[int, ...]] = {**dict(shape.matrices()), **dict.fromkeys(shape.norms(), (shape.hidden,))}
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    rng = np.random.Generator(np.random.PCG64(SEED))
    for size in sizes.values():
        if len(size) == 1:
            values = np.ones(size, dtype=np.float32)
        else:
            values = rng.standard_normal(size, dtype=np.float32) * np.float32(DEVIATION)
        file.write(_bfloat16(values).tobytes())


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of each float's bits, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
