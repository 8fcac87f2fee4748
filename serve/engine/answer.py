"""Records what a step made of one request: sampled tokens become deltas, and a choice that is done says why.

Knows tokens and text; knows nothing of how either was computed, nor of who listens.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from serve.engine.sampler import RowLogprobs
from serve.engine.sequence import Sequence
from serve.engine.stream import TextStream
from serve.engine.vocabulary import Vocabulary
from serve.generation import Delta, Event, FinishReason, GenerationRequest, PromptDelta, Timing, TokenLogprob

__all__ = ["Answer"]


@dataclass(frozen=True, slots=True)
class _End:
    reason: FinishReason
    stop: str | int | None = None


class Answer:
    """One request's choices while they are made. Its first event is the `PromptDelta`; later ones wait for it."""

    def __init__(
        self,
        request: GenerationRequest,
        sequences: SequenceOf[Sequence],
        vocabulary: Vocabulary,
        end_ids: frozenset[int],
    ) -> None:
        self.request_id = request.request_id
        self.open_sequences = list(sequences)
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        self._params = request.params
        self._first = sequences[0]
        self._prompt = tuple(sequences[0].tokens)
        self._streams = [TextStream(vocabulary, self._prompt, request.params) for _ in sequences]
        self._prompt_logprobs: list[TokenLogprob | None] = [None]
        self._opened = False
        self._outbox: list[Event] = []

    def score(self, rows: SequenceOf[RowLogprobs]) -> None:
        """Log-probabilities of the next prompt tokens, in order."""
        self._prompt_logprobs += [self._vocabulary.token_logprob(row) for row in rows]

    def accept(self, sequence: Sequence, token_id: int, logprobs: RowLogprobs | None, now_s: float) -> bool:
        """Take a choice's next token; True if it was the last. The sequence has it already."""
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        end, text = self._advance(sequence, token_id)
        entries = () if logprobs is None else (self._vocabulary.token_logprob(logprobs),)
        self._emit(sequence, text, (token_id,), entries, end, now_s)
        return end is not None

    def end(self, sequence: Sequence, reason: FinishReason, now_s: float) -> None:
        """End a choice between tokens: aborted, or nothing was to be generated."""
        self._emit(sequence, self._streams[sequence.choice_index].flush().text, (), (), _End(reason), now_s)

    def take_events(self) -> list[Event]:
        """The events since the last call; none until the prompt is through."""
        if not self._opened:
            if not self._outbox or not self._prompt_done():
                return []
            self._opened = True
            self._outbox.insert(0, self._prompt_delta())
        events, self._outbox = self._outbox, []
        return events

    def _advance(self, sequence: Sequence, token_id: int) -> tuple[_End | None, str]:
        """Whether and why this token ends the choice, and the text that goes out with it."""
        params, stream = self._params, self._streams[sequence.choice_index]
        end = self._end_by_token(token_id)
        if end is not None and not params.include_stop_str_in_output:
            return end, stream.flush().text
        match = stream.push(token_id, may_stop=sequence.num_output_tokens > params.min_tokens)
        if match.stop is not None:
            return _End("stop", match.stop), match.text
        if end is None and sequence.num_output_tokens >= sequence.max_tokens:
            end = _End("length")
        if end is None:
            return None, match.text
        rest = stream.flush()
        return (end if rest.stop is None else _End("stop", rest.stop)), match.text + rest.text

    def _end_by_token(self, token_id: int) -> _End | None:
        if token_id in self._end_ids and not self._params.ignore_eos:
            return _End("stop")
        return _End("stop", token_id) if token_id in self._params.stop_token_ids else None

    def _emit(
        self,
        sequence: Sequence,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        end: _End | None,
        now_s: float,
    ) -> None:
        delta = Delta(self.request_id, sequence.choice_index, text, token_ids, logprobs)
        if end is not None:
            self.open_sequences.remove(sequence)
            delta = Delta(
                *(self.request_id, sequence.choice_index, text, token_ids, logprobs),
                finish_reason=end.reason,
                stop_reason=end.stop,
                timing=_timing(sequence, now_s),
            )
        self._outbox.append(delta)

    def _prompt_done(self) -> bool:
        # An aborted request never gets the rest of its scores: what there is goes out with the abort.
        scored = self._params.prompt_logprobs is None or len(self._prompt_logprobs) == len(self._prompt)
        return scored or not self.open_sequences

    def _prompt_delta(self) -> PromptDelta:
        cached_tokens = self._first.num_reused
        if self._params.prompt_logprobs is None:
            return PromptDelta(self.request_id, self._prompt, cached_tokens=cached_tokens)
        text = self._vocabulary.decode(self._prompt, skip_special_tokens=self._params.skip_special_tokens)
        return PromptDelta(self.request_id, self._prompt, text, tuple(self._prompt_logprobs), cached_tokens)


def _timing(sequence: Sequence, now_s: float) -> Timing:
    started = sequence.first_scheduled_s if sequence.first_scheduled_s is not None else now_s
    first = sequence.first_token_s if sequence.first_token_s is not None else now_s
    return Timing(
        queue_s=started - sequence.submitted_s,
        first_token_s=first - sequence.submitted_s,
        total_s=now_s - sequence.submitted_s,
        running_sequences=sequence.running_when_scheduled,
    )
