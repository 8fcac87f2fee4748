"""A Llama-shaped decoder as one call per step: every layer, the paged attention and the head, without Python between.

Knows tensors, not models: whoever builds it says which projection is which (`serve.engine.native`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.kernels.library import Layer, Model, SpanRange, Step, address, library, team
from serve.kernels.linear import PackedLinear

__all__ = ["Decoder", "DecoderShape", "LayerWeights", "Span"]


_KEPT_ROWS = 64
"""Of logits whose memory stays: as many sequences as decode together; a prompt that is scored takes more."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The sizes of the model. head_dim is even and at most 256; hidden and intermediate are free."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    epsilon: float
    scaling: float
    block_size: int


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: seven projections, float32 norm weights, and its part of the KV cache.

    keys, values: bf16 `[kv_heads, blocks, block_size, width]`, in the kernels' own order (csrc/attention.h); width is
    head_dim rounded up to 32. query_norm, key_norm: `[head_dim]` (Qwen3) or None.
    window: how many tokens a query sees, itself included; None sees all.
    """

    query: PackedLinear
    key: PackedLinear
    value: PackedLinear
    output: PackedLinear
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    input_norm: Tensor
    post_norm: Tensor
    keys: Tensor
    values: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of a step that are one sequence's tokens, from `first_position` on; and its block table."""

    first_row: int
    num_rows: int
    first_position: int
    blocks: Sequence[int]


class Decoder:
    """Not thread-safe: one step at a time, from one thread. Everything is bf16 or compressed; the residual is fp32."""

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[LayerWeights],
        *,
        embedding: Tensor | None,
        final_norm: Tensor,
        head: PackedLinear,
        cosines: Tensor,
        sines: Tensor,
        threads: int,
    ) -> None:
        """embedding: bf16 `[vocabulary, hidden]`, or None where it is tied to a bf16 head.

        cosines, sines: float32 `[positions, head_dim / 2]`.
        """
        self._kept = (list(layers), embedding, final_norm, head, cosines, sines)
        self._layers = (Layer * len(layers))(*(_layer(layer) for layer in layers))
        self.vocabulary = head.spec.outputs
        _, blocks, block_size, width = layers[0].keys.shape
        self._model = Model(
            num_layers=len(layers),
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            block_size=shape.block_size,
            head_stride=blocks * block_size * width,
            epsilon=shape.epsilon,
            scaling=shape.scaling,
            layers=ctypes.addressof(self._layers),
            embedding=address(embedding, torch.bfloat16 if embedding is not None else None),
            final_norm=address(final_norm, torch.float32),
            head=head.spec,
            cosines=address(cosines, torch.float32),
            sines=address(sines, torch.float32),
        )
        self._rooms: dict[int, Tensor] = {}
        self._no_hidden = torch.empty(0, shape.hidden)
        self._decoder = library().ht_decoder(team(threads), byref(self._model))

    def __del__(self) -> None:
        if decoder := getattr(self, "_decoder", None):
            library().ht_decoder_free(decoder)

    def step(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        spans: Sequence[Span],
        logit_rows: Sequence[int],
        hidden_rows: Sequence[int],
    ) -> tuple[Tensor, list[int], Tensor]:
        """For N token_ids and positions, R logit_rows and K hidden_rows of them.

        Returns float32 logits `[R, vocabulary]`, which the next step may overwrite; the likeliest token of each, -1
        where logits are not finite; and what the head would read of the other rows, float32 `[K, hidden]`. The new keys
        and values are in the cache afterwards. Plain numbers, as a tensor for each would cost 10 microseconds.
        """
        tables = [_numbers(span.blocks) for span in spans]
        ranges = (SpanRange * len(spans))(
            *(
                SpanRange(span.first_row, span.num_rows, span.first_position, len(table), ctypes.addressof(table))
                for span, table in zip(spans, tables, strict=True)
            )
        )
        numbers = [_numbers(values) for values in (token_ids, positions, logit_rows, hidden_rows)]
        tokens_at, positions_at, logit_rows_at, hidden_rows_at = map(ctypes.addressof, numbers)
        best = _numbers([0] * len(logit_rows))
        logits = self._room(len(logit_rows))
        hidden = torch.empty(len(hidden_rows), self._model.hidden) if hidden_rows else self._no_hidden
        step = Step(
            num_rows=len(token_ids),
            num_spans=len(spans),
            num_logits=len(logit_rows),
            token_ids=tokens_at,
            positions=positions_at,
            logit_rows=logit_rows_at,
            spans=ctypes.addressof(ranges),
            logits=address(logits),
            best=ctypes.addressof(best),
            num_hidden=len(hidden_rows),
            hidden_rows=hidden_rows_at,
            hidden=address(hidden),
        )
        library().ht_decode(self._decoder, byref(step))
        return logits, list(best), hidden

    def _room(self, rows: int) -> Tensor:
        """For so many rows of logits; mostly the same memory, as new pages cost a step more than its Python."""
        if rows > _KEPT_ROWS:
            return torch.empty(rows, self.vocabulary)
        if rows not in self._rooms:
            room = torch.empty(rows, self.vocabulary)
            self._rooms = {count: room[:count] for count in range(rows + 1)}
        return self._rooms[rows]

    def project(self, hidden: Tensor) -> Tensor:
        """The head alone. hidden: float32 `[R, hidden]`, normalized; returns float32 `[R, vocabulary]`."""
        logits = torch.empty(len(hidden), self.vocabulary)
        library().ht_project(self._decoder, address(hidden, torch.float32), len(hidden), address(logits))
        return logits


def _layer(weights: LayerWeights) -> Layer:
    return Layer(
        **{name: getattr(weights, name).spec for name in ("query", "key", "value", "output", "gate", "up", "down")},
        input_norm=address(weights.input_norm, torch.float32),
        post_norm=address(weights.post_norm, torch.float32),
        query_norm=address(weights.query_norm),
        key_norm=address(weights.key_norm),
        keys=address(weights.keys, torch.bfloat16),
        values=address(weights.values, torch.bfloat16),
        window=weights.window or 0,
    )


def _numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
