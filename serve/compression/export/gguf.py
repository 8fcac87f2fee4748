"""Writes a compressed model as one GGUF file, which llama.cpp and what is built on it read, down to phones.

Tensors keep their integers (`gguf_blocks`); embeddings and a dense head keep the recipe's floating type, norms and
biases become float32, as llama.cpp wants them. Its "llama" architecture rotates neighbouring pairs of a head's
channels where transformers rotates the two halves, so rows of q and k change places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from serve.compression.export.gguf_blocks import block_type, to_blocks
from serve.compression.export.gguf_vocabulary import read_vocabulary
from serve.compression.plan import Plan
from serve.compression.restore import REST, shells, take_layers
from serve.compression.skeleton import Skeleton
from serve.compression.stages import Mixed
from serve.errors import RecipeError, UnsupportedArchitecture

__all__ = ["check_gguf", "write_gguf"]

Parts = Iterable[tuple[str, Mapping[str, Tensor]]]
_DENSE = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_FILE_TYPE = {
    "F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0, "Q4_0": LlamaFileType.MOSTLY_Q4_0, "Q4_1": LlamaFileType.MOSTLY_Q4_1,
}  # fmt: skip


@dataclass(frozen=True)
class _Family:
    """llama.cpp's architecture; `interleaved`: it rotates neighbouring pairs; `stretches`: it reads rope factors."""

    architecture: MODEL_ARCH
    interleaved: bool = False
    stretches: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family(MODEL_ARCH.LLAMA, interleaved=True, stretches=True),
    "MistralForCausalLM": _Family(MODEL_ARCH.LLAMA, interleaved=True, stretches=True),
    "Qwen2ForCausalLM": _Family(MODEL_ARCH.QWEN2),
    "Qwen3ForCausalLM": _Family(MODEL_ARCH.QWEN3),
}


def check_gguf(skeleton: Skeleton, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `SetupError` naming what GGUF, or llama.cpp, cannot hold, before anything is compressed."""
    _family(skeleton)
    if isinstance(plan.recipe.quantizer, Mixed):
        raise RecipeError(f"recipe {plan.recipe.name}: mixed chooses among formats that GGUF does not have")
    for part in (REST, *skeleton.blocks):
        for _, shell in shells(skeleton, plan, part):
            block_type(shell)
    read_vocabulary(tokenizer, skeleton.model.config.vocab_size)


def write_gguf(
    file: Path, name: str, skeleton: Skeleton, plan: Plan, tokenizer: PreTrainedTokenizerBase, parts: Parts
) -> None:
    """The model as `file`; `name` is what programs show of it. Large tensors wait in a temporary file."""
    family, config = _family(skeleton), skeleton.model.config
    writer = GGUFWriter(file, family.architecture.name.lower(), use_temp_file=True)
    writer.add_name(name)
    _add_shape(writer, config)
    read_vocabulary(tokenizer, config.vocab_size).write(writer)
    names = get_tensor_name_map(family.architecture, config.num_hidden_layers)
    used: list[str] = []
    if (factors := _rope_factors(skeleton, family)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for part, tensors in parts:
        layers, dense = take_layers(skeleton, plan, part, tensors)
        dense |= {f"{key}.bias": layer.bias for key, layer in layers.items() if layer.bias is not None}
        for key, layer in layers.items():
            blocks = to_blocks(layer, _rows(key, layer.out_features, family, config))
            used.append(blocks.type)
            kind = GGMLQuantizationType[blocks.type]
            writer.add_tensor(_target(names, f"{key}.weight"), blocks.data.numpy(), raw_dtype=kind)
        for key, tensor in dense.items():
            rows = _rows(key.rpartition(".")[0], tensor.shape[0], family, config)
            _add_dense(writer, _target(names, key), tensor.cpu() if rows is None else tensor.cpu()[rows])
    writer.add_file_type(_FILE_TYPE[max(used, key=used.count) if used else _DENSE[plan.recipe.dtype]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _family(skeleton: Skeleton) -> _Family:
    name, config = type(skeleton.model).__name__, skeleton.model.config
    if name not in _FAMILIES:
        raise UnsupportedArchitecture(f"{name}: GGUF is written for {', '.join(_FAMILIES)}")
    family, rope = _FAMILIES[name], config.rope_parameters
    if rope.get("rope_type", "default") not in (("default", "llama3", "linear") if family.stretches else ("default",)):
        raise UnsupportedArchitecture(f"{name}: GGUF is not written for its {rope['rope_type']} positions")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or config.hidden_act != "silu":
        raise UnsupportedArchitecture(f"{name}: llama.cpp knows neither a partly rotated head nor {config.hidden_act}")
    return family


def _add_shape(writer: GGUFWriter, config: PretrainedConfig) -> None:
    c: Any = config
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_context_length(min(c.max_position_embeddings, getattr(c, "sliding_window", None) or 1 << 30))
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)


def _rope_factors(skeleton: Skeleton, family: _Family) -> Tensor | None:
    """By how much each frequency is slowed down, float32 `[head / 2]`, from the model's own table."""
    config: Any = skeleton.model.config
    if not family.stretches or config.rope_parameters.get("rope_type", "default") == "default":
        return None
    anything: Any = skeleton.model
    slowed: Tensor = anything.model.rotary_emb.inv_freq.float().cpu()
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(slowed.numel()) / slowed.numel())
    factors: Tensor = plain / slowed
    return factors


def _rows(module: str, count: int, family: _Family, config: PretrainedConfig) -> Tensor | None:
    """The order of a projection's rows: each head's two halves interleaved, for q and k of "llama"."""
    c: Any = config
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(module.rpartition(".")[2])
    if heads is None or not family.interleaved:
        return None
    return torch.arange(count).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _target(names: Any, key: str) -> str:
    found: str | None = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UnsupportedArchitecture(f"{key}: llama.cpp has no tensor for it")
    return found


def _add_dense(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    """Vectors as float32; matrices in their own type, bf16 as the bytes that it is, for numpy does not know it."""
    tensor = (tensor.float() if tensor.dim() < 2 else tensor).contiguous()
    if tensor.dtype == torch.bfloat16:
        data: np.ndarray[Any, Any] = tensor.view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())
