"""Lays a plan out as one ragged row of tokens, all chunks side by side: plain numbers, for either path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from serve.engine.scheduler import Chunk

__all__ = ["StepInputs", "make_inputs"]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """N tokens of all chunks; the R rows whose logits are needed, one per sampling chunk and then those that score."""

    chunks: tuple[Chunk, ...]
    """In the order of their rows: decodes first, longest context first, so that they can attend in groups."""
    starts: list[int]
    """Each chunk's first row."""
    token_ids: list[int]  # [N]
    positions: list[int]  # [N]
    logit_rows: list[int]  # [R]
    hidden_rows: list[int]  # [K], whose hidden states a witness wants
    sampling: tuple[Chunk, ...]
    scoring: tuple[Chunk, ...]
    keeping: tuple[Chunk, ...]


def make_inputs(chunks: Iterable[Chunk]) -> StepInputs:
    """The rows of a plan's chunks."""
    ordered = sorted(chunks, key=lambda chunk: (chunk.length, -chunk.start))
    starts: list[int] = []
    tokens: list[int] = []
    positions: list[int] = []
    sampled: list[int] = []
    scored: list[int] = []
    kept: list[int] = []
    for chunk in ordered:
        start = len(tokens)
        starts.append(start)
        tokens += chunk.sequence.tokens[chunk.start : chunk.stop]
        positions += range(chunk.start, chunk.stop)
        if chunk.samples:
            sampled.append(start + chunk.length - 1)
        scored += (start + position - chunk.start for position in chunk.scored)
        kept += (start + position - chunk.start for position in chunk.kept)
    return StepInputs(
        chunks=tuple(ordered),
        starts=starts,
        token_ids=tokens,
        positions=positions,
        logit_rows=sampled + scored,
        hidden_rows=kept,
        sampling=tuple(chunk for chunk in ordered if chunk.samples),
        scoring=tuple(chunk for chunk in ordered if chunk.scored),
        keeping=tuple(chunk for chunk in ordered if chunk.kept),
    )
