"""A step's inputs as the tensors of one forward pass of the plain path: its row of tokens, and who attends to what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.attention import QueryGroup
from serve.engine.blocks import NULL_BLOCK
from serve.engine.inputs import StepInputs
from serve.engine.scheduler import Chunk

__all__ = ["RaggedRow", "lay_out"]

_GROUP_SEQUENCES = 16
"""Decoding sequences that attend together: more would pad short contexts to long ones, and widen a tile's memory."""


@dataclass(frozen=True, slots=True)
class RaggedRow:
    """N tokens, of which R have their logits computed."""

    token_ids: Tensor  # [1, N]
    positions: Tensor  # [1, N]
    rope_lengths: list[int]  # [N], the context length that each token's rotary embedding is computed for
    slots: Tensor  # [N]
    groups: list[QueryGroup]
    logit_rows: Tensor  # [R]


def lay_out(inputs: StepInputs, block_size: int, device: torch.device) -> RaggedRow:
    """Every tensor is made anew."""
    return RaggedRow(
        token_ids=_row(inputs.token_ids, device)[None],
        positions=_row(inputs.positions, device)[None],
        rope_lengths=[n for chunk in inputs.chunks for n in _rope_lengths(chunk)],
        slots=_row([slot for chunk in inputs.chunks for slot in _slots(chunk, block_size)], device),
        groups=[_group(inputs, members, block_size, device) for members in _members(inputs.chunks)],
        logit_rows=_row(inputs.logit_rows, device),
    )


def _rope_lengths(chunk: Chunk) -> Iterable[int]:
    return (max(chunk.sequence.rope_tokens, position + 1) for position in range(chunk.start, chunk.stop))


def _slots(chunk: Chunk, block_size: int) -> Iterable[int]:
    blocks = chunk.sequence.blocks
    return (blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, chunk.stop))


def _members(ordered: tuple[Chunk, ...]) -> Iterable[range]:
    """Which chunks attend together."""
    decodes = sum(chunk.length == 1 for chunk in ordered)
    for start in range(0, decodes, _GROUP_SEQUENCES):
        yield range(start, min(start + _GROUP_SEQUENCES, decodes))
    for index in range(decodes, len(ordered)):
        yield range(index, index + 1)


def _group(inputs: StepInputs, members: range, block_size: int, device: torch.device) -> QueryGroup:
    chunks = inputs.chunks[members.start : members.stop]
    width = max(len(chunk.sequence.blocks) for chunk in chunks)
    tables = [chunk.sequence.blocks + [NULL_BLOCK] * (width - len(chunk.sequence.blocks)) for chunk in chunks]
    return QueryGroup(
        start=inputs.starts[members[0]],
        stop=inputs.starts[members[-1]] + chunks[-1].length,
        first_positions=[chunk.start for chunk in chunks],
        num_queries=chunks[0].length,
        block_tables=torch.tensor(tables, device=device),
        block_size=block_size,
    )


def _row(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
