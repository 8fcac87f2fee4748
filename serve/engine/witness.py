"""Somebody who looks on while a text is computed: what drift is measured from, without computing anything twice.

A witness belongs to the first choice of one request. It is shown numbers of consecutive positions, each position once,
also where a sequence is preempted and computed again. What it makes of them is its own business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from serve.engine.inputs import StepInputs
    from serve.engine.runner import StepOutputs
    from serve.engine.sequence import Sequence

__all__ = ["Wanted", "Witness", "show"]

_logger = logging.getLogger(__name__)

Wanted = Literal["hidden", "logits", "prompt_logits"]
"""hidden: the final hidden state (after the last norm) of every position that is computed.
logits: the raw logits of every position that a token is drawn from.
prompt_logits: the raw logits of every prompt position from `first` on that predicts a prompt token. Such a request is
scored for the witness alone: it yields to all others, and asks for no tokens."""


class Witness(Protocol):
    """Called on the engine's thread, between two steps: what takes long delays everybody."""

    @property
    def wants(self) -> Wanted: ...

    @property
    def first(self) -> int:
        """The first position that it wants to see."""
        ...

    def see(self, position: int, rows: Tensor) -> None:
        """rows: `[n, hidden]` or fp32 `[n, vocab]` of the positions from `position` on; copy what is to be kept."""
        ...


def show(inputs: StepInputs, outputs: StepOutputs) -> None:
    """What a step computed, to those who want to see it. A witness that fails sees nothing more."""
    for sequence, position, rows in _sights(inputs, outputs):
        if sequence.witness is not None:
            try:
                sequence.witness.see(position, rows)
            except Exception:
                _logger.exception("a witness failed; it sees nothing more of %s", sequence.request_id)
                sequence.witness = _Blind(sequence.witness.wants, sequence.num_tokens)


def _sights(inputs: StepInputs, outputs: StepOutputs) -> Iterator[tuple[Sequence, int, Tensor]]:
    for row, chunk in enumerate(inputs.sampling):
        if chunk.sequence.witness is not None and chunk.sequence.witness.wants == "logits":
            yield chunk.sequence, chunk.stop - 1, outputs.logits[row : row + 1]
    row = len(inputs.sampling)
    for chunk in inputs.scoring:
        if chunk.sequence.only_scores:
            yield chunk.sequence, chunk.scored.start, outputs.logits[row : row + len(chunk.scored)]
        row += len(chunk.scored)
    row = 0
    for chunk in inputs.keeping if outputs.hidden is not None else ():
        assert outputs.hidden is not None
        yield chunk.sequence, chunk.kept.start, outputs.hidden[row : row + len(chunk.kept)]
        row += len(chunk.kept)


class _Blind:
    """Stands in for a witness that failed, so that its sequence is still what it was."""

    def __init__(self, wants: Wanted, first: int) -> None:
        self.wants, self.first = wants, first

    def see(self, position: int, rows: Tensor) -> None:
        pass
