"""Paired drift at an ingress: which requests are sampled, who reads them, and where the numbers go.

    draw    before a request is sent: sampled? by whom read? Then its replica records what it computes anyway.
    score   after its end: the recording goes to the reader, the numbers to the journal.

Nobody waits for it. It is bounded in number and in time, and it is the first to give way: what is not scored is
counted, by reason. Knows no torch and opens no recording.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from serve.errors import HalftoneError, Overloaded, VariantUnavailable
from serve.generation import GenerationRequest
from serve.heartbeat import VariantState, View
from serve.journal import Journal, Trace
from serve.pairs import DriftSettings, Kept, Scores, Side
from serve.rollout import Drift, unit_hash

__all__ = ["Reader", "Sample", "Scorer"]

_OPEN_SAMPLES = 32
"""Sampled requests of one ingress that are being served or scored; further ones are shed."""
_READ_AT_ONCE = 4
_SAVED_S = 2.0
"""So much scoring is allowed at once where a share of the time is: enough for a first look."""

Result = Literal["scored", "shed", "no_data", "unfinished", "failed"]


class Reader(Protocol):
    """A variant that scores what another has recorded (`serve.router.Link`)."""

    async def score(self, kept: Kept, side: Side) -> Scores: ...


@dataclass(frozen=True)
class Sample:
    """One request to be scored. `about`: the variant whose drift it shows; `reader` scores the recording."""

    about: VariantState
    reader: str
    side: Side
    keep: Literal["hidden", "logits"]
    greedy: bool


class Scorer:
    """The samples of one ingress. All methods on one event loop."""

    def __init__(
        self,
        settings: DriftSettings | None,
        readers: Mapping[str, Reader],
        journal: Journal,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._allowance = _Allowance(settings.max_busy_ratio if settings else None, clock())
        self._readers = readers
        self._journal = journal
        self._open = 0
        self._turns = asyncio.Semaphore(_READ_AT_ONCE)

    def draw(self, request: GenerationRequest, served_by: VariantState, view: View) -> Sample | None:
        """Whether this request is sampled; the caller then asks for a recording and reports how it ended."""
        settings = self._settings
        if settings is None or not _falls(settings.sample_rate, "drift", request.request_id, view):
            return None
        pair = _pair(settings.reference, request, served_by, view)
        if pair is None:
            return None
        about, reader, side = pair
        if reader.state != "ready":
            self._journal.sampled(about, "no_data")
            return None
        if view.users_wait or self._open >= _OPEN_SAMPLES or self._allowance.is_spent(self._clock()):
            self._journal.sampled(about, "shed")
            return None
        self._open += 1
        shared = served_by.head is not None and served_by.head == reader.head
        return Sample(about, reader.name, side, "hidden" if shared else "logits", _is_greedy(request))

    async def score(self, sample: Sample, kept: Kept | None, trace: Trace) -> None:
        """The answer has ended; None: it left no recording, for want of room."""
        try:
            if kept is None:
                self._journal.sampled(sample.about, "shed")
                return
            async with self._turns:
                begun_s = self._clock()
                try:
                    scores = await self._readers[sample.reader].score(kept, sample.side)
                finally:
                    self._allowance.spend(self._clock() - begun_s)
        except HalftoneError as error:
            self._journal.sampled(sample.about, _result(error))
        else:
            flipped = scores.first_divergence is not None if sample.greedy else None
            self._journal.scored(sample.about, scores)
            trace.scored(sample.about.name, Drift(**scores.summary(), flipped=flipped))
        finally:
            self._open -= 1

    def unfinished(self, sample: Sample) -> None:
        """The answer failed or nobody wanted its end: there is nothing to score."""
        self._open -= 1
        self._journal.sampled(sample.about, "unfinished")


class _Allowance:
    """Seconds of scoring that may still be begun: `ratio` of the time that goes by, of which a little is saved up.

    What was begun is finished, and paid for by the clock: where a text takes longer, fewer are scored.
    """

    def __init__(self, ratio: float | None, now_s: float) -> None:
        self._ratio = ratio
        self._left_s = _SAVED_S
        self._at_s = now_s

    def is_spent(self, now_s: float) -> bool:
        if self._ratio is None:
            return False
        self._left_s = min(_SAVED_S, self._left_s + self._ratio * (now_s - self._at_s))
        self._at_s = now_s
        return self._left_s <= 0

    def spend(self, seconds: float) -> None:
        self._left_s -= seconds


def _pair(
    reference: str, request: GenerationRequest, served_by: VariantState, view: View
) -> tuple[VariantState, VariantState, Side] | None:
    """Whose drift, who reads, and what the recorded pass is; None where there is nothing to compare.

    The reference's own drift is zero by definition. What it served is read by another instead: of such text, which no
    compressed variant has sampled, a perplexity ratio is fair.
    """
    states = {state.name: state for state in view.variants}
    if served_by.name != reference:
        return served_by, states[reference], "variant"
    split = view.split
    others = [
        state
        for state in view.variants
        if state.name != reference
        and state.state == "ready"
        and (split.weights.get(state.name) or split.shadow_rates.get(state.name))
    ]
    canary = [state for state in others if state.name == split.canary]
    if not (canary or others):
        return None
    drawn = (canary or others)[int(unit_hash(split.salt, f"reader {request.request_id}"), 16) % len(canary or others)]
    return drawn, drawn, "reference"


def _falls(rate: float, purpose: str, request_id: str, view: View) -> bool:
    return int(unit_hash(view.split.salt, f"{purpose} {request_id}"), 16) < rate * 2**64


def _is_greedy(request: GenerationRequest) -> bool:
    """The answer is what the variant finds likeliest, unchanged by any processor."""
    params = request.params
    plain = params.repetition_penalty == 1.0 and not (params.presence_penalty or params.frequency_penalty)
    return params.temperature == 0 and plain and not params.logit_bias and not params.min_tokens


def _result(error: HalftoneError) -> Result:
    if isinstance(error, Overloaded):
        return "shed"
    return "no_data" if isinstance(error, VariantUnavailable) else "failed"
