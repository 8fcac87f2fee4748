"""What requests leave behind at an ingress: metrics as a client would measure them, and one `Outcome` per call.

A `Trace` follows one call and sees its events as they arrive, before any reader does. Times run from the moment the
router was asked. The journal keeps, bounded, what the controller has not yet acknowledged, and counts what it dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import count

from serve import metrics
from serve.api.backend import Call
from serve.errors import (
    GenerationFailed,
    HalftoneError,
    OutOfMemory,
    OutputNotFinite,
    Overloaded,
    RequestError,
    ServiceError,
    VariantUnavailable,
)
from serve.generation import Delta, Event, Failure, PromptDelta
from serve.heartbeat import VariantState
from serve.hop import ReplicaDied
from serve.metrics import Recorder, Snapshot, VariantLabels
from serve.pairs import Scores
from serve.rollout import Assignment, Batch, Drift, Outcome, Split, unit_hash
from serve.rollout.looping import WINDOW_TOKENS, is_looping

__all__ = ["Journal", "Trace", "code_of"]

_KEPT_RECORDS = 8192
_COUNTED_HERE = (
    metrics.TTFT,
    metrics.ITL,
    metrics.TPOT,
    metrics.E2E,
    metrics.QUEUE,
    metrics.PROMPT_TOKENS,
    metrics.GENERATION_TOKENS,
    metrics.SUCCESS,
    metrics.ERRORS,
    metrics.SHADOW,
    metrics.DRIFT_SAMPLES,
    metrics.DRIFT_KL,
    metrics.DRIFT_TOKENS,
    metrics.DRIFT_AGREEMENTS,
    metrics.DRIFT_NONFINITE,
    metrics.DRIFT_NLL_TOKENS,
    metrics.DRIFT_NLL_VARIANT,
    metrics.DRIFT_NLL_REFERENCE,
)
_REFUSALS = (
    *("variant_unavailable", "model_not_found", "invalid_request", "internal_error"),
    *(f"http_{status}" for status in (400, 401, 403, 404, 408, 409, 413, 429, 431)),
)
"""What a call is turned away with before it comes to a variant."""


class Journal:
    """The book of one ingress process. Knows no clock but the process's own and nothing of who reads it."""

    def __init__(self, model_name: str, ingress: str) -> None:
        self._model_name = model_name
        self._ingress = ingress
        self._recorder = Recorder()
        self._numbers = count(1)
        self._sequence = 0
        self._unsent: dict[int, Outcome] = {}
        self._lost: dict[str, int] = {}
        self._declared: set[VariantLabels] = set()
        for code in _REFUSALS:
            self._recorder.add(metrics.ERRORS, VariantLabels(model_name, "", ""), 0.0, code)

    def declare(self, states: Iterable[VariantState]) -> None:
        """Begin every series at zero."""
        for state in states:
            if (labels := self._labels(state)) not in self._declared:
                self._declared.add(labels)
                self._recorder.declare(labels, _COUNTED_HERE)

    def open(self, call: Call, state: VariantState, assignment: Assignment | None, split: Split) -> Trace:
        outcome = Outcome(
            record=next(self._numbers),
            variant=state.name,
            route=assignment.route if assignment else "pinned",
            revision=split.revision,
            assigned_at_s=time.time(),
            unit=unit_hash(split.salt, call.sticky_key) if call.sticky_key is not None else None,
            held_out=bool(assignment and assignment.held_out),
            warm_up=state.is_cold,
        )
        self.keep(outcome)
        return Trace(self, self._recorder, self._labels(state), call, outcome)

    def open_shadow(self, call: Call, state: VariantState, split: Split, served: Trace) -> Trace:
        """A mirrored call: it has a record, paired with the served one, and no request metric counts it."""
        outcome = replace(
            served.outcome,
            record=next(self._numbers),
            variant=state.name,
            revision=split.revision,
            warm_up=state.is_cold,
            shadow=True,
            pair=served.outcome.record,
        )
        self.keep(outcome)
        return Trace(self, Recorder(), self._labels(state), call, outcome, whole=True)

    def mirrored(self, state: VariantState, result: str) -> None:
        """A call was to be mirrored, and this became of it."""
        self._recorder.add(metrics.SHADOW, self._labels(state), 1, result)

    def refused(self, code: str) -> None:
        """A call that came to no variant."""
        self._recorder.add(metrics.ERRORS, VariantLabels(self._model_name, "", ""), 1, code)

    def sampled(self, state: VariantState, result: str) -> None:
        """A request was to be scored, and this became of it."""
        self._recorder.add(metrics.DRIFT_SAMPLES, self._labels(state), 1, result)

    def scored(self, state: VariantState, scores: Scores) -> None:
        """The drift of `state`'s variant on one answer."""
        labels = self._labels(state)
        self.sampled(state, "scored")
        for kl_nats in scores.kl_nats:
            self._recorder.observe(metrics.DRIFT_KL, labels, kl_nats)
        self._recorder.add(metrics.DRIFT_TOKENS, labels, scores.tokens)
        self._recorder.add(metrics.DRIFT_AGREEMENTS, labels, scores.top1_agreements)
        self._recorder.add(metrics.DRIFT_NONFINITE, labels, scores.nonfinite_tokens)
        self._recorder.add(metrics.DRIFT_NLL_TOKENS, labels, scores.nll_tokens)
        self._recorder.add(metrics.DRIFT_NLL_VARIANT, labels, scores.nll_variant_nats)
        self._recorder.add(metrics.DRIFT_NLL_REFERENCE, labels, scores.nll_reference_nats)

    def keep(self, outcome: Outcome) -> None:
        self._unsent[outcome.record] = outcome
        if len(self._unsent) > _KEPT_RECORDS:
            dropped = self._unsent.pop(next(iter(self._unsent)))
            self._lost[dropped.variant] = self._lost.get(dropped.variant, 0) + 1

    def batch(self) -> Batch:
        """All that was not acknowledged yet."""
        self._sequence += 1
        return Batch(self._ingress, self._sequence, time.time(), tuple(self._unsent.values()), dict(self._lost))

    def acknowledge(self, batch: Batch) -> None:
        """The controller has it; what changed since stays."""
        for outcome in batch.outcomes:
            if self._unsent.get(outcome.record) is outcome:
                del self._unsent[outcome.record]

    def snapshot(self) -> Snapshot:
        return self._recorder.snapshot()

    def _labels(self, state: VariantState) -> VariantLabels:
        return VariantLabels(self._model_name, state.name, state.precision)


class Trace:
    """One call while it runs. `observe` is given every event as it arrives, `left` once if the client goes away."""

    def __init__(
        self,
        journal: Journal,
        recorder: Recorder,
        labels: VariantLabels,
        call: Call,
        outcome: Outcome,
        *,
        whole: bool = False,
    ) -> None:
        self._journal = journal
        self._recorder = recorder
        self._labels = labels
        self._outcome = outcome
        self._received_s = time.perf_counter()
        self._choices_left = {request.request_id: request.n for request in call.requests}
        self._first_s: dict[str, float] = {}
        self._choices: dict[tuple[str, int], _Choice] = {}
        self._tokens: list[int] | None = [] if whole else None
        self._has_text = False

    @property
    def outcome(self) -> Outcome:
        """The record as it stands."""
        return self._outcome

    def listen(self) -> None:
        """Remember every token of the answer, which another will be compared with. Before its first event."""
        self._tokens = []

    def compare(self, served: Trace) -> None:
        """Both answers are whole: how far they are the same."""
        pairs = zip(self._tokens or (), served._tokens or (), strict=False)
        differing = (index for index, (ours, theirs) in enumerate(pairs) if ours != theirs)
        shortest = min(len(self._tokens or ()), len(served._tokens or ()))
        self._note(agreed_tokens=next(differing, shortest))
        self._journal.keep(self._outcome)

    def observe(self, event: Event) -> None:
        if isinstance(event, PromptDelta):
            self._recorder.add(metrics.PROMPT_TOKENS, self._labels, len(event.prompt_token_ids))
            self._note(prompt_tokens=self._outcome.prompt_tokens + len(event.prompt_token_ids))
        elif isinstance(event, Delta):
            self._on_delta(event, time.perf_counter() - self._received_s)
        else:
            self._on_failure(event)

    def left(self) -> None:
        """The client went away before the end."""
        if not self._choices_left:
            return
        self._recorder.add(metrics.SUCCESS, self._labels, sum(self._choices_left.values()), "abort")
        self._choices_left.clear()
        self._note(client_fault=True, finish_reason="abort")
        self._finish()

    def died(self) -> None:
        """The variant's only replica died before anything came; another variant answers."""
        self._recorder.add(metrics.ERRORS, self._labels, len(self._choices_left), ReplicaDied.code)
        self._choices_left.clear()
        self._note(error=kind_of(ReplicaDied("")))
        self._finish()

    def scored(self, variant: str, drift: Drift) -> None:
        """What scoring said, later than the end: the record is sent again under its number."""
        if variant == self._outcome.variant:
            self._note(drift=drift)
        else:
            self._note(read_by=variant, reading=drift)
        self._journal.keep(self._outcome)

    def _on_delta(self, delta: Delta, at_s: float) -> None:
        tokens = len(delta.token_ids)
        self._has_text |= bool(delta.text)
        if self._tokens is not None:
            self._tokens += delta.token_ids
        choice = self._choices.setdefault((delta.request_id, delta.choice_index), _Choice())
        if tokens and delta.request_id not in self._first_s:
            self._first_s[delta.request_id] = at_s
            self._recorder.observe(metrics.TTFT, self._labels, at_s)
        choice.last_tokens.extend(delta.token_ids)
        if gap_s := choice.receive(tokens, at_s):
            self._recorder.observe(metrics.ITL, self._labels, gap_s, tokens)
        self._recorder.add(metrics.GENERATION_TOKENS, self._labels, tokens)
        if delta.finish_reason is not None:
            self._on_end_of_choice(delta, choice, at_s)

    def _on_end_of_choice(self, delta: Delta, choice: _Choice, at_s: float) -> None:
        assert delta.finish_reason is not None
        self._recorder.add(metrics.SUCCESS, self._labels, 1, delta.finish_reason)
        if choice.tokens > 1:
            choice.tpot_s = (at_s - choice.first_s) / (choice.tokens - 1)
            self._recorder.observe(metrics.TPOT, self._labels, choice.tpot_s)
        if delta.timing:
            self._note(running_sequences=delta.timing.running_sequences)
        self._note(finish_reason=delta.finish_reason)
        self._choices_left[delta.request_id] -= 1
        if not self._choices_left[delta.request_id]:
            self._on_end_of_request(delta, at_s)

    def _on_end_of_request(self, delta: Delta, at_s: float) -> None:
        self._recorder.observe(metrics.E2E, self._labels, at_s)
        if delta.timing:
            self._recorder.observe(metrics.QUEUE, self._labels, delta.timing.queue_s)
        self._end(delta.request_id)

    def _on_failure(self, failure: Failure) -> None:
        self._recorder.add(metrics.ERRORS, self._labels, 1, code_of(failure.error))
        self._note(error=kind_of(failure.error), client_fault=isinstance(failure.error, RequestError))
        self._end(failure.request_id)

    def _end(self, request_id: str) -> None:
        self._choices_left.pop(request_id, None)
        if not self._choices_left:
            self._finish()

    def _finish(self) -> None:
        choices = list(self._choices.values())
        gaps = sum(choice.gaps for choice in choices)
        tpots_s = [choice.tpot_s for choice in choices if choice.tpot_s is not None]
        self._note(
            finished_at_s=time.time(),
            completion_tokens=sum(choice.tokens for choice in choices),
            ttft_s=min(self._first_s.values(), default=None),
            itl_mean_s=sum(choice.gap_sum_s for choice in choices) / gaps if gaps else None,
            itl_max_s=max((choice.gap_max_s for choice in choices), default=0.0) if gaps else None,
            tpot_s=sum(tpots_s) / len(tpots_s) if tpots_s else None,
            e2e_s=time.perf_counter() - self._received_s,
            looping=any(is_looping(choice.last_tokens) for choice in choices),
            empty=self._outcome.finish_reason == "stop" and not self._has_text,
        )
        self._journal.keep(self._outcome)

    def _note(self, **changes: object) -> None:
        self._outcome = replace(self._outcome, **changes)  # type: ignore[arg-type]


class _Choice:
    """Arrival times of one choice. Tokens that arrive together share the gap before them in equal parts."""

    def __init__(self) -> None:
        self.tokens = 0
        self.last_tokens: deque[int] = deque(maxlen=WINDOW_TOKENS)
        self.first_s = 0.0
        self.tpot_s: float | None = None
        self.gaps = 0
        self.gap_sum_s = 0.0
        self.gap_max_s = 0.0
        self._last_s = 0.0

    def receive(self, tokens: int, at_s: float) -> float | None:
        """The gap per token, None for the first tokens of the choice and for none at all."""
        if not tokens:
            return None
        began, self.tokens = self.tokens > 0, self.tokens + tokens
        gap_s, self._last_s = (at_s - self._last_s) / tokens, at_s
        if not began:
            self.first_s = at_s
            return None
        self.gaps += tokens
        self.gap_sum_s += gap_s * tokens
        self.gap_max_s = max(self.gap_max_s, gap_s)
        return gap_s


def code_of(error: HalftoneError) -> str:
    """A label's value: one of the codes that our own classes carry."""
    if isinstance(error, RequestError):
        return error.code or "invalid_request"
    return error.code if isinstance(error, ServiceError) else "internal_error"


_KINDS: dict[type[HalftoneError], str] = {
    ReplicaDied: "replica_died",
    Overloaded: "overloaded",
    VariantUnavailable: "unavailable",
    OutputNotFinite: "nan",
    OutOfMemory: "oom",
    GenerationFailed: "internal",
    RequestError: "invalid",
}


def kind_of(error: HalftoneError) -> str:
    """An outcome's short word for what went wrong."""
    return next((word for kind, word in _KINDS.items() if isinstance(error, kind)), "internal")
