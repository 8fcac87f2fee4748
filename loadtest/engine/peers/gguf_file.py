"""Writes the bench model as GGUF: bf16 from its safetensors, and from that Q8_0 or Q4_0 by llama.cpp's own quantizer.

`python -m loadtest.engine.peers.gguf_file MODEL_FOLDER PRECISION OUT`, in llama.cpp's environment. Q4_0 gets the head
in Q6_K, as llama.cpp's own command does.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

_FILE_TYPES = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(model: Path, precision: str, out: Path) -> None:
    """Writes aside, then renames."""
    aside = out.with_name(f"{out.name}.partial")
    if precision == "BF16":
        _write_bf16(model, aside)
    else:
        source = out.with_name("BF16.gguf")
        if not source.exists():
            write(model, "BF16", source)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = _FILE_TYPES[precision]
        params.nthread = 2
        if llama_cpp.llama_model_quantize(str(source).encode(), str(aside).encode(), params):
            raise RuntimeError(f"llama.cpp could not quantize {source} to {precision}")
    aside.rename(out)


def _write_bf16(model: Path, out: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, values in _tensors(model / "model.safetensors"):
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name), _float32(values))
        else:
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
            kind = next((config[key] for part, key in heads.items() if part in name), None)
            rows = values if kind is None else _interleaved(values, kind)
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(_gguf_name(name), np.ascontiguousarray(rows).view(np.uint8), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(path: Path) -> Any:
    """Name and bf16 values, as their bits."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    bits = np.memmap(path, np.uint16, "r", offset=start)
    for name, about in header.items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            yield name, np.asarray(bits[first // 2 : last // 2]).reshape(about["shape"])


def _interleaved(rows: npt.NDArray[np.uint16], heads: int) -> npt.NDArray[np.uint16]:
    """llama.cpp turns neighbouring pairs, transformers the halves of a head: the rows change places."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
