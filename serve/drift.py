"""Pairs two passes over the same tokens: what a variant computed while it served, and what a reader makes of the text.

    served by nf4   keeper  -> recording (hidden states) --+
                                                          pairing -> scores
    read by bf16    prefill -> logits, a chunk at a time --+

`Keeper` and `Pairing` are witnesses (`serve.engine.witness`): the engine shows them rows while it computes. The keeper
copies them, within a budget. The pairing turns the recorded rows of the same positions into logits and compares, in
float32 over the whole vocabulary, a few positions at a time: what it holds is a few rows of logits, whatever the length
of the text. Logits are raw, before any sampling processor. KL divergence as in llama.cpp's `--kl-divergence`.

Knows torch and `serve.quality`; knows no engine, no Ray and no HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from serve.generation import Delta, Event
from serve.pairs import Recording, Scores, Side
from serve.quality.divergence import TokenScores, score_rows

__all__ = ["Head", "Keeper", "Pairing", "Room"]

_PROJECTED_NUMBERS = 2**22
"""Recorded logits that are made at once: 32 positions of a vocabulary of 128 k. Each time reads the whole head."""
_PROMPT_ROWS = 256
"""Prompt positions that are kept at most, those next to the answer."""


class Head(Protocol):
    """What a pairing needs of an output head (`serve.engine.head.Head`)."""

    @property
    def digest(self) -> str: ...

    @property
    def logits_dtype(self) -> torch.dtype: ...

    @property
    def project(self) -> Callable[[Tensor], Tensor]: ...


class Room:
    """Bytes that all open recordings of one process may take together. Any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def give_back(self, size: int) -> None:
        with self._lock:
            self._left += size


class Keeper:
    """Records one request while it is served. A recording that finds no more room is given up whole.

    wants: "hidden" where the reader has the same head, else "logits" (of the answer's positions alone).
    """

    first = 0

    def __init__(
        self,
        wants: Literal["hidden", "logits"],
        prompt: tuple[int, ...],
        head: Head | None,
        room: Room,
        limit_bytes: int,
    ) -> None:
        self.wants = wants
        self._token_ids = list(prompt)
        self._prompt_tokens = len(prompt)
        self._head = head
        self._room = room
        self._limit = limit_bytes
        self._first: int | None = None
        self._rows: list[Tensor] = []
        self._bytes = 0
        self.full = False
        """It ran out of room: there will be no recording."""

    def see(self, position: int, rows: Tensor) -> None:
        skipped = max(0, self._prompt_tokens - _PROMPT_ROWS - position)
        rows = rows[skipped:]
        if self.full or not len(rows):
            return
        size = rows.numel() * rows.element_size()
        if self._bytes + size > self._limit or not self._room.take(size):
            self.full = True
            self._rows.clear()
            return
        self._bytes += size
        if self._first is None:
            self._first = position + skipped
        self._rows.append(rows.detach().to("cpu", copy=True))

    def hear(self, event: Event) -> None:
        """What the request says: the tokens of its first choice."""
        if isinstance(event, Delta) and event.choice_index == 0:
            self._token_ids += event.token_ids

    def recording(self) -> Recording | None:
        """Once the request has ended; None where nothing could be kept, or nothing was answered."""
        if self.full or self._first is None or len(self._token_ids) <= self._prompt_tokens:
            return None
        rows = torch.cat(self._rows)
        words = rows if rows.dtype is torch.float32 else rows.view(torch.int16)
        head = self._head if self.wants == "hidden" else None
        return Recording(
            token_ids=tuple(self._token_ids),
            prompt_tokens=self._prompt_tokens,
            first=self._first,
            rows=words.numpy(),
            dtype=str(rows.dtype).removeprefix("torch."),
            head=head.digest if head else None,
            logits_dtype=str(head.logits_dtype).removeprefix("torch.") if head else "float32",
        )

    def close(self) -> None:
        """Forget it all and free the room."""
        self._rows.clear()
        self._room.give_back(self._bytes)
        self._bytes, self.full = 0, True


class Pairing:
    """Scores a recording beside a reader's pass over the same tokens. Raises ValueError where their heads differ."""

    wants: Literal["prompt_logits"] = "prompt_logits"

    def __init__(self, recording: Recording, side: Side, head: Head | None) -> None:
        if recording.head is not None and (head is None or head.digest != recording.head):
            raise ValueError("hidden states of another output head cannot be read here")
        self.first = recording.first
        self._recording = recording
        self._side = side
        self._head = head
        self._targets = torch.tensor(recording.token_ids)
        # Filled in place: small tensors that stay, between large ones that go, would keep the heap from shrinking.
        self._scores = _room_for(min(len(recording.rows), len(recording.token_ids) - 1 - recording.first))
        self._next = recording.first

    def see(self, position: int, rows: Tensor) -> None:
        """rows: the reader's logits, fp32 `[n, vocab]`."""
        assert position == self._next
        count = max(1, _PROJECTED_NUMBERS // rows.shape[1])
        for at in range(0, len(rows), count):
            self._compare(position + at, rows[at : at + count])
        self._next = position + len(rows)

    def _compare(self, position: int, read: Tensor) -> None:
        recorded = self._recorded(position, len(read))
        read = read[: len(recorded)]
        targets = self._targets[position + 1 : position + 1 + len(recorded)]
        pair = (read, recorded) if self._side == "variant" else (recorded, read)
        begin = position - self.first
        for name, values in vars(score_rows(*pair, targets)).items():
            getattr(self._scores, name)[begin : begin + len(values)] = values

    def _recorded(self, position: int, count: int) -> Tensor:
        """The logits that were served, `[count, vocab]`."""
        begin = position - self._recording.first
        rows = torch.from_numpy(self._recording.rows[begin : begin + count].copy())
        if self._recording.dtype != "float32":
            rows = rows.view(getattr(torch, self._recording.dtype))
        if self._recording.head is None:
            return rows
        assert self._head is not None
        return self._head.project(rows).to(getattr(torch, self._recording.logits_dtype)).float()

    def scores(self) -> Scores:
        """Once the reader has seen the whole text. Raises ValueError if it has not."""
        whole = self._scores
        wanted = len(whole.record)
        if self._next - self.first < wanted:
            raise ValueError(f"{self._next - self.first} of {wanted} positions were scored")
        answered = torch.arange(len(whole.record)) + self.first >= self._recording.prompt_tokens - 1
        return _scores(whole, answered, fair=~answered if self._side == "variant" else torch.ones_like(answered))


def _room_for(count: int) -> TokenScores:
    numbers = torch.zeros(3, count, dtype=torch.float64)
    flags = torch.zeros(3, count, dtype=torch.bool)
    return TokenScores(
        kl_divergence=numbers[0],
        nll_reference=numbers[1],
        nll_variant=numbers[2],
        same_top=flags[0],
        right_reference=flags[1],
        right_variant=flags[2],
        record=torch.zeros(count, dtype=torch.int64),
    )


def _scores(whole: TokenScores, answered: Tensor, fair: Tensor) -> Scores:
    finite = whole.finite
    answer = whole.select(answered & finite)
    likely = whole.select(fair & finite)
    delta = (-answer.nll_variant).exp() - (-answer.nll_reference).exp()
    apart = (~whole.same_top[answered]).nonzero()
    return Scores(
        kl_nats=tuple(answer.kl_divergence.tolist()),
        top1_agreements=int(answer.same_top.sum()),
        nonfinite_tokens=int((answered & ~finite).sum()),
        delta_p=float(delta.mean()) if len(delta) else 0.0,
        first_divergence=int(apart[0]) if len(apart) else None,
        nll_tokens=len(likely.nll_variant),
        nll_variant_nats=float(likely.nll_variant.sum()),
        nll_reference_nats=float(likely.nll_reference.sum()),
    )
