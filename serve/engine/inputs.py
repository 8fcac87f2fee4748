"""Turns a plan into the tensors of one forward pass: all chunks side by side in one ragged row of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.attention import QueryGroup
from serve.engine.blocks import NULL_BLOCK
from serve.engine.scheduler import Chunk

__all__ = ["StepInputs", "make_inputs"]

_GROUP_SEQUENCES = 16
"""Decoding sequences that attend together: more would pad short contexts to long ones, and widen a tile's memory."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """N tokens of all chunks; the R rows whose logits are needed, one per sampling chunk and then those that score."""

    token_ids: Tensor  # [1, N]
    positions: Tensor  # [1, N]
    rope_lengths: list[int]  # [N], the context length that each token's rotary embedding is computed for
    slots: Tensor  # [N]
    groups: list[QueryGroup]
    logit_rows: Tensor  # [R]
    hidden_rows: Tensor  # [K], whose hidden states a witness wants
    sampling: tuple[Chunk, ...]
    scoring: tuple[Chunk, ...]
    keeping: tuple[Chunk, ...]


def make_inputs(chunks: Iterable[Chunk], block_size: int, device: torch.device) -> StepInputs:
    """Lay out a plan's chunks: decodes first, longest context first, so that they can attend in groups."""
    ordered = sorted(chunks, key=lambda chunk: (chunk.length, -chunk.start))
    starts = _starts(ordered)
    sampling = tuple(chunk for chunk in ordered if chunk.samples)
    scoring = tuple(chunk for chunk in ordered if chunk.scored)
    keeping = tuple(chunk for chunk in ordered if chunk.kept)
    rows = [starts[chunk] + chunk.length - 1 for chunk in sampling]
    for chunk in scoring:
        rows += [starts[chunk] + position - chunk.start for position in chunk.scored]
    kept = [starts[chunk] + position - chunk.start for chunk in keeping for position in chunk.kept]
    return StepInputs(
        token_ids=_row([t for chunk in ordered for t in chunk.sequence.tokens[chunk.start : chunk.stop]], device),
        positions=_row([p for chunk in ordered for p in range(chunk.start, chunk.stop)], device),
        rope_lengths=[n for chunk in ordered for n in _rope_lengths(chunk)],
        slots=_row([slot for chunk in ordered for slot in _slots(chunk, block_size)], device)[0],
        groups=[_group(members, starts, block_size, device) for members in _members(ordered)],
        logit_rows=_row(rows, device)[0],
        hidden_rows=_row(kept, device)[0],
        sampling=sampling,
        scoring=scoring,
        keeping=keeping,
    )


def _starts(ordered: SequenceOf[Chunk]) -> dict[Chunk, int]:
    starts, row = {}, 0
    for chunk in ordered:
        starts[chunk] = row
        row += chunk.length
    return starts


def _rope_lengths(chunk: Chunk) -> Iterable[int]:
    return (max(chunk.sequence.rope_tokens, position + 1) for position in range(chunk.start, chunk.stop))


def _slots(chunk: Chunk, block_size: int) -> Iterable[int]:
    blocks = chunk.sequence.blocks
    return (blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, chunk.stop))


def _members(ordered: SequenceOf[Chunk]) -> Iterable[SequenceOf[Chunk]]:
    decodes = [chunk for chunk in ordered if chunk.length == 1]
    for start in range(0, len(decodes), _GROUP_SEQUENCES):
        yield decodes[start : start + _GROUP_SEQUENCES]
    for chunk in ordered[len(decodes) :]:
        yield [chunk]


def _group(members: SequenceOf[Chunk], starts: dict[Chunk, int], block_size: int, device: torch.device) -> QueryGroup:
    width = max(len(chunk.sequence.blocks) for chunk in members)
    tables = [chunk.sequence.blocks + [NULL_BLOCK] * (width - len(chunk.sequence.blocks)) for chunk in members]
    return QueryGroup(
        start=starts[members[0]],
        stop=starts[members[-1]] + members[-1].length,
        first_positions=[chunk.start for chunk in members],
        num_queries=members[0].length,
        block_tables=torch.tensor(tables, device=device),
        block_size=block_size,
    )


def _row(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor([values], dtype=torch.long, device=device)
