"""Grows the teacher into a larger model that computes the same function: Net2Net (arXiv:1511.05641) for Llama.

Training a few million parameters from noise takes hours on a CPU; starting from a trained 656K model takes
none. Every dimension is widened and layers are added so that the output does not change, while everything new
is reachable by a gradient:

- residual stream: new channels hold zeros, and nobody writes to them yet; their readers are random. A norm
  over twice the channels sees half the mean square, so what follows it is divided by the square root of two;
- attention heads: each head's rotary pairs are spread over a head twice as wide, whose even frequencies are
  exactly the teacher's; the queries of new pairs are zero, the keys random; new value channels are random,
  and nobody reads them yet;
- MLP neurons and whole layers: random inputs, zero outputs, so they add nothing at first.

The norms before attention and MLP are folded into the projections behind them. The embedding is also the
output matrix: ids that the teacher does not have start as a piece it never predicts, and its two ways to end a
story are swapped (see `teacher`).
"""

import math

import torch
from torch import Tensor
from transformers import LlamaConfig

from .teacher import EOS_ID, TEACHER_EOS_ID
from .tokenizer import VOCABULARY_SIZE

__all__ = ["grow", "student_config"]

NEVER_PREDICTED_ID = 213  # a fragment of the teacher's start marker that only existed while its pieces were chosen
EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"


def student_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def grow(
    teacher: dict[str, Tensor], empty: dict[str, Tensor], head_dims: tuple[int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Fills the state `empty` of a student (only shapes are read), float32, from the teacher's state.

    The student's logits on the teacher's ids equal the teacher's, but for the swapped ends of a story.
    `head_dims` are the teacher's and the student's; both have the same number of heads.
    """
    student = {name: _initial(name, tensor, generator) for name, tensor in empty.items() if name != "lm_head.weight"}
    _grow_embedding(teacher, student, generator)
    layers, old_layers = (1 + max(map(_layer_of, state)) for state in (student, teacher))
    for index in range(old_layers):
        old, new = f"model.layers.{index}.", f"model.layers.{index * layers // old_layers}."
        _grow_attention(_part(teacher, old), _part(student, new), head_dims)
        _grow_mlp(_part(teacher, old), _part(student, new))
    student["lm_head.weight"] = student[EMBEDDING]
    return student


def _initial(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.ndim == 1:
        return torch.ones(tensor.shape)
    if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
        return torch.zeros(tensor.shape)
    return torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor.shape[1])


def _grow_embedding(teacher: dict[str, Tensor], student: dict[str, Tensor], generator: torch.Generator) -> None:
    old, new = teacher[EMBEDDING], student[EMBEDDING]
    rows, columns = old.shape
    new[rows:, :columns] = old[NEVER_PREDICTED_ID]
    new[rows:, :columns] += 0.02 * torch.randn((len(new) - rows, columns), generator=generator)
    new[:rows, :columns] = old
    new[[EOS_ID, TEACHER_EOS_ID], :columns] = old[[TEACHER_EOS_ID, EOS_ID]]
    norm, narrow = student[FINAL_NORM], teacher[FINAL_NORM]
    norm.fill_(narrow.mean().item())
    norm[:columns] = narrow
    norm *= math.sqrt(columns / new.shape[1])


def _grow_attention(old: dict[str, Tensor], new: dict[str, Tensor], head_dims: tuple[int, int]) -> None:
    old_dim, new_dim = head_dims
    places = _channel_places(old_dim, new_dim)
    sharpness = math.sqrt(new_dim / old_dim)  # undoes attention's 1/sqrt(head_dim)
    new["self_attn.q_proj"].zero_()
    for name, scale in (("self_attn.q_proj", sharpness), ("self_attn.k_proj", 1.0), ("self_attn.v_proj", 1.0)):
        folded = scale * _folded(old, name, "input_layernorm", new)
        by_head = new[name].view(-1, new_dim, new[name].shape[1])  # [heads, head_dim, in_features]
        by_head[:, places, : folded.shape[1]] = folded.view(-1, old_dim, folded.shape[1])
    output = old["self_attn.o_proj"]
    by_head = new["self_attn.o_proj"].view(new["self_attn.o_proj"].shape[0], -1, new_dim)
    by_head[: output.shape[0], :, places] = output.view(output.shape[0], -1, old_dim)


def _grow_mlp(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        folded = _folded(old, name, "post_attention_layernorm", new)
        new[name][: folded.shape[0], : folded.shape[1]] = folded
    down = old["mlp.down_proj"]
    new["mlp.down_proj"][: down.shape[0], : down.shape[1]] = down


def _folded(old: dict[str, Tensor], name: str, norm: str, new: dict[str, Tensor]) -> Tensor:
    """The teacher's projection with the norm before it multiplied in, for a residual stream of the new width."""
    width_ratio = new[norm].shape[0] / old[norm].shape[0]
    return old[name] * old[norm] / math.sqrt(width_ratio)


def _channel_places(old_dim: int, new_dim: int) -> Tensor:
    """Where a head's channels go: its rotary pair (j, j + old/2) turns like (k, k + new/2), k = j new/old."""
    half = torch.arange(old_dim // 2) * (new_dim // old_dim)
    return torch.cat([half, half + new_dim // 2])


def _layer_of(name: str) -> int:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else 0


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one layer, under their names in it."""
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix).removesuffix(".weight"): state[name] for name in names}
