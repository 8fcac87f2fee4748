"""Attention over a paged KV cache: each sequence's keys and values lie in blocks scattered over one pool.

No step makes a contiguous copy of a sequence's keys and values. `tiled_attention` walks the keys in tiles of at most
`TILE_TOKENS`, gathers one tile's blocks, and folds it into a running softmax (online softmax, arXiv 1805.02867; its
use in tiles is FlashAttention, arXiv 2205.14135), so extra memory is bounded by the tile and not by the context.
`reference_attention` is the same sum written plainly, and a test compares them. Scores and sums are fp32 whatever the
cache's type.

Shapes: H query heads, K key/value heads, G = H // K query heads on each, D head size, S sequences, Q query tokens each.
Tiles begin at fixed key positions, so the order of a sum depends on a token's position and not on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serve.engine.kv_cache import Pool

__all__ = ["TILE_TOKENS", "AttentionOptions", "QueryGroup", "Tile", "reference_attention", "tiled_attention"]

TILE_TOKENS = 512
_MASKED = -1e30  # finite, so that a tile in which a row sees nothing adds exp(-1e30 - m) = 0 and never NaN


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What an architecture adds to softmax(q k^T) v."""

    scaling: float
    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it; None sees all."""
    softcap: float | None = None
    """Scores pass through softcap * tanh(score / softcap) (Gemma 2)."""
    sinks: Tensor | None = None
    """[H]: a learned score per head that takes part in the softmax and has no value (gpt-oss)."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A range of keys for the first `num_sequences` of a group (those that reach it)."""

    num_sequences: int
    blocks: Tensor  # [num_sequences * tile_blocks], pool block numbers
    hidden: Tensor | None  # [num_sequences, Q, tile_tokens], True where a query must not see a key; None sees all


@dataclass(slots=True)
class QueryGroup:
    """Consecutive rows of the batch that attend together: S sequences with Q query tokens each, longest context first.

    Decoding sequences form groups with Q = 1; each prompt chunk is a group with S = 1.
    """

    start: int
    stop: int
    first_positions: SequenceOf[int]
    """Per sequence, the position of its first query token, falling."""
    num_queries: int
    block_tables: Tensor  # [S, blocks of the longest], padded with the null block
    block_size: int
    _tiles: dict[int | None, list[Tile]] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return len(self.first_positions)

    def tiles(self, window: int | None) -> list[Tile]:
        """The tiles that any query of the group sees, made once per step and used by every layer."""
        if window not in self._tiles:
            self._tiles[window] = self._make_tiles(window)
        return self._tiles[window]

    def _make_tiles(self, window: int | None) -> list[Tile]:
        step = max(TILE_TOKENS // self.block_size, 1) * self.block_size
        earliest = 0 if window is None else max(min(self.first_positions) - window + 1, 0)
        end = max(self.first_positions) + self.num_queries
        return [self._make_tile(key, min(key + step, end), window) for key in range(earliest // step * step, end, step)]

    def _make_tile(self, first_key: int, end: int, window: int | None) -> Tile:
        reached = sum(position + self.num_queries > first_key for position in self.first_positions)
        first_block, last_block = first_key // self.block_size, -(-end // self.block_size)
        blocks = self.block_tables[:reached, first_block:last_block]
        device = blocks.device
        keys = torch.arange(first_key, last_block * self.block_size, device=device)
        first = torch.tensor(self.first_positions[:reached], device=device)
        queries = first[:, None] + torch.arange(self.num_queries, device=device)  # [S, Q]
        hidden = keys > queries[..., None]
        if window is not None:
            hidden |= keys <= queries[..., None] - window
        return Tile(reached, blocks.reshape(-1), hidden if bool(hidden.any()) else None)


def tiled_attention(query: Tensor, keys: Pool, values: Pool, group: QueryGroup, options: AttentionOptions) -> Tensor:
    """Attention of one group's rows. query: [H, S * Q, D]. Returns [S * Q, H, D of the values] in fp32."""
    rows = _rows_by_key_head(query.float() * options.scaling, keys.num_heads, group)  # [K, S, G * Q, D]
    tiles = group.tiles(options.window)
    if len(tiles) == 1 and options.sinks is None:
        weights = _scores(rows, keys, tiles[0], group, options).softmax(-1)
        return _rows_by_token(_weigh(weights, values, tiles[0]), group)
    highest, total, mixed = _empty_sums(rows, values, options, group)
    for tile in tiles:
        n = tile.num_sequences
        scores = _scores(rows[:, :n], keys, tile, group, options)
        new_highest = torch.maximum(highest[:, :n], scores.amax(-1, keepdim=True))
        weights = (scores - new_highest).exp_()
        shrink = (highest[:, :n] - new_highest).exp_()
        total[:, :n].mul_(shrink).add_(weights.sum(-1, keepdim=True))
        mixed[:, :n].mul_(shrink).add_(_weigh(weights, values, tile))
        highest[:, :n] = new_highest
    return _rows_by_token(mixed / total, group)


def reference_attention(
    query: Tensor, keys: Pool, values: Pool, group: QueryGroup, options: AttentionOptions
) -> Tensor:
    """The same as `tiled_attention`, one sequence and one plain softmax at a time."""
    mixed = []
    for index, first in enumerate(group.first_positions):
        q = query[:, index * group.num_queries : (index + 1) * group.num_queries].float()  # [H, Q, D]
        k, v = (_contiguous(cache, group.block_tables[index], q.shape[0]) for cache in (keys, values))
        scores = q @ k.transpose(1, 2) * options.scaling
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        positions = torch.arange(first, first + group.num_queries, device=q.device)[:, None]
        key_positions = torch.arange(k.shape[1], device=q.device)
        visible = key_positions <= positions
        if options.window is not None:
            visible &= key_positions > positions - options.window
        scores = scores.masked_fill(~visible, float("-inf"))
        if options.sinks is not None:
            sinks = options.sinks.float()[:, None, None].expand(-1, group.num_queries, 1)
            scores = torch.cat([scores, sinks], -1)
        mixed.append((scores.softmax(-1)[..., : k.shape[1]] @ v).transpose(0, 1))
    return torch.cat(mixed)


def _scores(rows: Tensor, keys: Pool, tile: Tile, group: QueryGroup, options: AttentionOptions) -> Tensor:
    """[K, S, G * Q, tile_tokens]: scaled scores, with what a query must not see pushed out of the softmax."""
    scores = rows @ _gather(keys, tile).transpose(2, 3)
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
    if tile.hidden is not None:
        by_query = scores.view(*scores.shape[:2], -1, group.num_queries, scores.shape[-1])  # [K, S, G, Q, tile_tokens]
        by_query.masked_fill_(tile.hidden[None, :, None], _MASKED)
    return scores


def _weigh(weights: Tensor, values: Pool, tile: Tile) -> Tensor:
    return weights @ _gather(values, tile)


def _gather(pool: Pool, tile: Tile) -> Tensor:
    """One tile of a pool: [K, S, tile_tokens, D] in fp32."""
    return pool.gather(tile.blocks).view(pool.num_heads, tile.num_sequences, -1, pool.size)


def _rows_by_key_head(query: Tensor, num_key_heads: int, group: QueryGroup) -> Tensor:
    """[H, S * Q, D] -> [K, S, G * Q, D]: the query heads that share a key head become rows of one product."""
    split = query.reshape(num_key_heads, -1, group.num_sequences, group.num_queries, query.shape[-1])
    return split.transpose(1, 2).reshape(num_key_heads, group.num_sequences, -1, query.shape[-1])


def _rows_by_token(mixed: Tensor, group: QueryGroup) -> Tensor:
    """[K, S, G * Q, D] -> [S * Q, H, D]."""
    heads, sequences, _, size = mixed.shape
    split = mixed.view(heads, sequences, -1, group.num_queries, size)
    return split.permute(1, 3, 0, 2, 4).reshape(sequences * group.num_queries, -1, size)


def _empty_sums(
    rows: Tensor, values: Pool, options: AttentionOptions, group: QueryGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The running maximum, sum of weights and weighted values before any key was seen."""
    shape = (*rows.shape[:3], 1)
    mixed = rows.new_zeros(*rows.shape[:3], values.size)
    if options.sinks is None:
        return rows.new_full(shape, _MASKED), rows.new_zeros(shape), mixed
    sinks = options.sinks.float().view(rows.shape[0], 1, -1, 1, 1)  # [K, 1, G, 1, 1]
    return _spread(sinks, shape, group), rows.new_ones(shape), mixed


def _spread(sinks: Tensor, shape: tuple[int, ...], group: QueryGroup) -> Tensor:
    heads, sequences = shape[:2]
    return sinks.expand(heads, sequences, -1, group.num_queries, 1).reshape(shape).clone()


def _contiguous(pool: Pool, table: Tensor, num_heads: int) -> Tensor:
    """A whole sequence of one pool, [H, tokens, D] in fp32: what only the reference does."""
    return pool.gather(table).repeat_interleave(num_heads // pool.num_heads, dim=0)
