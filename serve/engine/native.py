"""The lean step: a covered model runs as one call into `serve.kernels`, layer by layer, without Python between.

Covered are the Llama-shaped classes in `COVERED`, in bf16 or in a format that has a packed form, on a CPU with the
kernels. Everything else keeps the plain path, and `accelerate` says in one line why. A dense weight is moved, not
copied: once packed, its plain form is gone, and the plain path with it.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from serve.engine.head import Head
from serve.engine.inputs import StepInputs
from serve.engine.kv_cache import KVCache, LayerShape
from serve.engine.memory import lazy_zeros
from serve.engine.runner import StepOutputs
from serve.kernels import Decoder, DecoderShape, LayerWeights, PackedLinear, Span, release, unavailable

__all__ = ["COVERED", "NativeRunner", "accelerate", "is_covered"]

COVERED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_PANEL = 32
_STATIC_ROPE = ("default", "linear", "llama3")


@runtime_checkable
class Packed(Protocol):
    """A compressed layer whose weights the kernels can read."""

    @property
    def packed(self) -> PackedLinear | None: ...


class NativeRunner:
    """Has the surface of `Runner` that the engine uses after start."""

    rope_switch_tokens = None
    rope_is_static = True

    def __init__(self, decoder: Decoder, head: Head | None) -> None:
        self.device = torch.device("cpu")
        self.head = head
        self._decoder = decoder

    def run(self, inputs: StepInputs, cache: KVCache) -> StepOutputs:
        """What is needed of the step's rows. Their keys and values are in the cache afterwards."""
        spans = [
            Span(start, chunk.length, chunk.start, chunk.sequence.blocks)
            for start, chunk in zip(inputs.starts, inputs.chunks, strict=True)
        ]
        logits, best, hidden = self._decoder.step(
            inputs.token_ids, inputs.positions, spans, inputs.logit_rows, inputs.hidden_rows
        )
        return StepOutputs(logits, hidden.bfloat16() if inputs.keeping else None, best)  # the head reads them in bf16


def is_covered(model: Any) -> bool:
    """Whether the kernels are for models of this kind, this type, this machine. `accelerate` has the last word."""
    known = type(model).__name__ in COVERED and model.dtype is torch.bfloat16
    return known and model.device.type == "cpu" and unavailable() is None


def accelerate(
    model: nn.Module, layers: list[LayerShape], cache: KVCache, threads: int, plain_head: Head | None = None
) -> NativeRunner | str:
    """The model on the kernels; or, with the model untouched, the reason why it stays on the plain path."""
    reason = _reason_against(model, layers, cache)
    if reason is not None:
        return reason
    config: Any = model.config
    body = model.get_submodule("model")
    head_dim = layers[0].key_size
    shape = DecoderShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=layers[0].num_heads,
        head_dim=head_dim,
        intermediate=config.intermediate_size,
        epsilon=config.rms_norm_eps,
        scaling=head_dim**-0.5,
        block_size=cache.block_size,
    )
    tied, embedding = _embedding(model)
    head = _pack(model, "lm_head")
    cosines, sines = _rotations(body.get_submodule("rotary_emb"), config.max_position_embeddings, head_dim)
    decoder = Decoder(
        shape,
        [_layer(body.get_submodule(f"layers.{i}"), config, cache, i) for i in range(len(layers))],
        embedding=None if tied else embedding,
        final_norm=_norm(body, "norm"),
        head=head,
        cosines=cosines,
        sines=sines,
        threads=threads,
    )
    shared = None
    if plain_head is not None and plain_head.dtype is torch.bfloat16:
        shared = Head(plain_head.digest, plain_head.dtype, torch.float32, lambda rows: decoder.project(rows.float()))
    release()
    return NativeRunner(decoder, shared)


def _reason_against(model: nn.Module, layers: list[LayerShape], cache: KVCache) -> str | None:
    first = layers[0]
    if first.device.type != "cpu":
        return "the kernels are for CPUs"
    if type(model).__name__ not in COVERED:
        return f"{type(model).__name__} is not among {', '.join(COVERED)}"
    config: Any = model.config
    rope = model.get_submodule("model.rotary_emb")
    checks = {
        "its KV cache is in int8": cache.keys[0].scales is not None,
        f"it computes in {first.dtype}, not in bf16": first.dtype is not torch.bfloat16,
        "its layers differ in shape": any(layer != first for layer in layers),
        "its heads are odd or more than 256 wide": first.key_size % 2 != 0 or first.key_size > 256,
        "its keys and values differ in width": first.key_size != first.value_size,
        "KV blocks are not 32 tokens or a multiple": cache.block_size % 32 != 0,
        "its activation is not SiLU": config.hidden_act not in ("silu", "swish"),
        "its rotary embedding changes with the length": getattr(rope, "rope_type", None) not in _STATIC_ROPE,
    }
    against = next((reason for reason, holds in checks.items() if holds), None)
    return against or unavailable() or _unpackable(model, len(layers))


def _unpackable(model: nn.Module, num_layers: int) -> str | None:
    names = [f"model.layers.{i}.{path}" for i in range(num_layers) for path in _PROJECTIONS.values()]
    for name in [*names, "lm_head"]:
        module = model.get_submodule(name)
        dense = type(module) is nn.Linear and module.weight.dtype is torch.bfloat16
        if not dense and not (isinstance(module, Packed) and module.packed is not None):
            return f"{name} is stored in a form that the kernels do not read ({type(module).__name__})"
    return None


def _layer(layer: nn.Module, config: Any, cache: KVCache, index: int) -> LayerWeights:
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[index] == "sliding_attention"
    attention = layer.get_submodule("self_attn")
    return LayerWeights(
        **{name: _pack(layer, path) for name, path in _PROJECTIONS.items()},
        input_norm=_norm(layer, "input_layernorm"),
        post_norm=_norm(layer, "post_attention_layernorm"),
        query_norm=_norm(attention, "q_norm") if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention, "k_norm") if hasattr(attention, "k_norm") else None,
        keys=_widened(cache.keys[index]),
        values=_widened(cache.values[index]),
        window=getattr(config, "sliding_window", None) if slides else None,
    )


def _widened(pool: Any) -> Tensor:
    """A pool of the cache with heads in whole panels of 32, as the kernels lay them out; still empty, so replaced."""
    width = -(-pool.data.shape[-1] // _PANEL) * _PANEL
    if pool.data.shape[-1] != width:
        pool.data = lazy_zeros((*pool.data.shape[:-1], width), pool.data.dtype, pool.data.device)
    return pool.data  # type: ignore[no-any-return]


def _pack(parent: nn.Module, name: str) -> PackedLinear:
    """A projection's packed weights; a dense one's plain weight is released."""
    module = parent.get_submodule(name)
    if isinstance(module, Packed) and module.packed is not None:
        return module.packed
    assert isinstance(module, nn.Linear)
    packed = PackedLinear.bf16(module.weight.detach(), module.bias)
    module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
    return packed


def _embedding(model: nn.Module) -> tuple[bool, Tensor]:
    """Whether the head shares the embedding's memory, and the embedding; a tied one is read from the packed head."""
    embedding: Any = model.get_submodule("model.embed_tokens")
    head: Any = model.get_submodule("lm_head")
    tied = type(head) is nn.Linear and head.weight.data_ptr() == embedding.weight.data_ptr()
    weight: Tensor = embedding.weight.detach()
    if tied:
        embedding.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return tied, weight


def _norm(parent: nn.Module, name: str) -> Tensor:
    weight: Any = parent.get_submodule(name).weight
    return weight.detach().float().contiguous()  # type: ignore[no-any-return]


@torch.inference_mode()
def _rotations(rope: nn.Module, num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The model's own cosines and sines, `[positions, head_dim / 2]` each."""
    positions = torch.arange(num_positions)[None]
    cosines, sines = rope(torch.empty(1, dtype=torch.float32), positions)
    half = head_dim // 2
    return cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()
