"""The engine: requests in, events out, and between them one thread that schedules, runs and records, step by step.

It knows neither HTTP nor Ray nor metrics: it takes token ids, calls `sink` once per step with every event of the step,
and tells facts. Text becomes token ids in `prompt`, before a request comes here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from serve.engine.answer import Answer
from serve.engine.architecture import adopt
from serve.engine.blocks import BlockPool
from serve.engine.inputs import StepInputs, make_inputs
from serve.engine.intake import check, context_tokens, end_token_ids, sequences_of
from serve.engine.kv_cache import KVCache
from serve.engine.memory import free_bytes
from serve.engine.sampler import RowLogprobs, choose, row_logprobs
from serve.engine.scheduler import Plan, Scheduler
from serve.engine.sequence import Sequence
from serve.engine.settings import EngineSettings, resolve
from serve.engine.vocabulary import Vocabulary
from serve.errors import GenerationFailed, HalftoneError, Overloaded, VariantUnavailable
from serve.generation import Event, Failure, GenerationRequest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["Engine", "EngineStats"]

_logger = logging.getLogger(__name__)
_SCORED_BYTES = 64 * 2**20
"""Logits of prompt positions that one step may hold: a long prompt times a large vocabulary would be gigabytes."""

Sink = Callable[[list[Event]], None]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Facts at one moment. Counters only grow."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_cache_bytes: int
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


class Engine:
    """Serves one model. `submit`, `abort`, `stats` may be called from any thread; `sink` is called from the engine's.

    Raises UnsupportedArchitecture for a model that it would serve wrong and ConfigError for settings that cannot hold.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: EngineSettings, sink: Sink) -> None:
        self._runner, layers = adopt(model)
        self.settings = resolve(
            settings,
            context_tokens=context_tokens(model.config.get_text_config()),
            kv_bytes_per_token=sum(layer.bytes_per_token for layer in layers),
            free_bytes=free_bytes(self._runner.device),
        )
        assert self.settings.kv_cache_bytes is not None, "resolve fills it"
        block_bytes = self.settings.block_size * sum(layer.bytes_per_token for layer in layers)
        num_blocks = self.settings.kv_cache_bytes // block_bytes
        self._cache = KVCache(layers, num_blocks, self.settings.block_size)
        self._pool = BlockPool(num_blocks)
        self._vocabulary_size = int(model.config.get_text_config().vocab_size)
        self._scheduler = Scheduler(
            self.settings, self._pool, max_scored_tokens=max(_SCORED_BYTES // (4 * self._vocabulary_size), 1)
        )
        self._vocabulary = Vocabulary(tokenizer)
        self._end_ids = end_token_ids(model, self._vocabulary)
        self._sink = sink
        self._answers: dict[str, Answer] = {}
        self._inbox: deque[tuple[GenerationRequest, float]] = deque()
        self._aborts: deque[str] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._draining = False
        self._arrivals = 0
        self._counters = {"steps": 0, "preemptions": 0, "prompt_tokens": 0, "generation_tokens": 0}
        self._thread = threading.Thread(target=self._loop, name="halftone-engine", daemon=True)

    # What other threads call

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False once its thread has ended, of itself or by `close`."""
        return self._thread.is_alive()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request whose prompt is token ids.

        Raises InvalidRequest, ContextLengthExceeded, Overloaded or VariantUnavailable; what is accepted always ends in
        a delta with a finish reason for each choice, or in one `Failure`.
        """
        check(request, self._vocabulary_size, self.settings)
        with self._wake:
            if self._closing:
                raise VariantUnavailable("the engine is shutting down; try again shortly", retry_after_s=1.0)
            waiting = len(self._scheduler.waiting) + sum(queued.n for queued, _ in self._inbox)
            if waiting + request.n > (self.settings.max_queue or 0):
                raise Overloaded(
                    f"{waiting} sequences wait already; the queue holds {self.settings.max_queue}", retry_after_s=1.0
                )
            self._inbox.append((request, time.perf_counter()))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request before the next step; unknown and finished ones are ignored."""
        with self._wake:
            self._aborts.append(request_id)
            self._wake.notify()

    def stats(self) -> EngineStats:
        """Counts as of the last step."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + len(self._inbox),
            kv_blocks_used=self._pool.num_used,
            kv_blocks_total=self._pool.num_blocks,
            kv_cache_bytes=self._cache.bytes,
            **self._counters,
        )

    def close(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """Stop: with `drain` what was accepted is finished first, otherwise it ends in a `Failure`. Joins the thread.

        A drain that takes longer than `timeout_s` is cut short.
        """
        with self._wake:
            self._closing, self._draining = True, drain
            self._wake.notify()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_s if drain else None)
        if self._thread.is_alive():
            self.close(drain=False)

    # The engine's own thread

    def _loop(self) -> None:
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        with torch.inference_mode():
            while self._wait():
                self._deliver(self._step())
        self._deliver(self._fail_all())

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the engine must end."""
        with self._wake:
            while not (self._closing or self._inbox or self._aborts or self._answers):
                self._wake.wait()
            return not self._closing or (self._draining and bool(self._inbox or self._answers))

    def _step(self) -> list[Event]:
        """Schedule, run, record. A step that fails fails its own requests, and the engine goes on."""
        events = self._take_in()
        plan = Plan(())
        try:
            plan = self._scheduler.schedule()
            if plan.chunks:
                self._note(plan)
                inputs = make_inputs(plan.chunks, self.settings.block_size, self._runner.device)
                logits = self._runner.run(inputs, self._cache)
                events += self._record(plan, inputs, logits)
        except Exception:
            _logger.exception("a step failed")
            events += self._fail(plan)
        return events

    def _take_in(self) -> list[Event]:
        """Admit what was submitted, then end what was aborted: an abort may overtake no submission."""
        with self._wake:
            submitted, aborted = list(self._inbox), list(self._aborts)
            self._inbox.clear()
            self._aborts.clear()
        events: list[Event] = []
        for request, submitted_s in submitted:
            try:
                self._accept(request, submitted_s)
            except Exception:
                _logger.exception("a request could not be taken in")
                events.append(Failure(request.request_id, _STEP_FAILED))
        return events + [event for request_id in aborted for event in self._abort(request_id)]

    def _accept(self, request: GenerationRequest, submitted_s: float) -> None:
        assert request.request_id not in self._answers, "request ids are given out once"
        sequences = sequences_of(request, self.settings, self._arrivals, submitted_s)
        self._arrivals += len(sequences)
        self._answers[request.request_id] = Answer(request, sequences, self._vocabulary, self._end_ids)
        for sequence in sequences:
            self._scheduler.add(sequence)

    def _abort(self, request_id: str) -> list[Event]:
        answer = self._answers.get(request_id)
        if answer is None:
            return []
        now_s = time.perf_counter()
        for sequence in list(answer.open_sequences):
            self._release(sequence)
            answer.end(sequence, "abort", now_s)
        return self._collect(answer)

    def _note(self, plan: Plan) -> None:
        """Facts that are known once a plan is made."""
        now_s = time.perf_counter()
        self._counters["steps"] += 1
        self._counters["preemptions"] += len(plan.preempted)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now_s
                sequence.running_when_scheduled = len(self._scheduler.running)
                self._counters["prompt_tokens"] += sequence.num_prompt_tokens if sequence.choice_index == 0 else 0

    def _record(self, plan: Plan, inputs: StepInputs, logits: Tensor) -> list[Event]:
        self._scheduler.record(plan)
        touched = dict.fromkeys(chunk.sequence.request_id for chunk in plan.chunks)
        broken = self._broken(inputs, logits)
        events = [event for request_id in broken for event in self._fail_request(request_id, _NOT_FINITE)]
        self._record_scores(inputs, logits[len(inputs.sampling) :], broken)
        self._record_tokens(inputs, logits[: len(inputs.sampling)], broken)
        self._end_unsampled(plan, broken)
        answers = [self._answers[request_id] for request_id in touched if request_id in self._answers]
        return events + [event for answer in answers for event in self._collect(answer)]

    def _broken(self, inputs: StepInputs, logits: Tensor) -> set[str]:
        """Requests whose logits are not finite."""
        finite = logits.amax(-1).isfinite().tolist()
        if all(finite):
            return set()
        owners = [chunk.sequence.request_id for chunk in inputs.sampling]
        owners += [chunk.sequence.request_id for chunk in inputs.scoring for _ in chunk.scored]
        return {owner for owner, good in zip(owners, finite, strict=True) if not good}

    def _record_scores(self, inputs: StepInputs, logits: Tensor, broken: set[str]) -> None:
        row = 0
        for chunk in inputs.scoring:
            sequence, rows = chunk.sequence, logits[row : row + len(chunk.scored)]
            row += len(chunk.scored)
            if sequence.request_id not in broken:
                targets = sequence.tokens[chunk.scored.start + 1 : chunk.scored.stop + 1]
                count = sequence.params.prompt_logprobs or 0
                self._answers[sequence.request_id].score(row_logprobs(rows, targets, [count] * len(targets)))

    def _record_tokens(self, inputs: StepInputs, logits: Tensor, broken: set[str]) -> None:
        sequences = [chunk.sequence for chunk in inputs.sampling]
        if not sequences:
            return
        tokens = choose(logits, sequences, sorted(self._end_ids))
        logprobs = _output_logprobs(logits, sequences, tokens)
        now_s = time.perf_counter()
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            if sequence.request_id in broken:
                continue
            sequence.tokens.append(token)
            self._counters["generation_tokens"] += 1
            if self._answers[sequence.request_id].accept(sequence, token, logprobs.get(row), now_s):
                self._scheduler.finish(sequence)
            elif sequence.num_tokens - 1 == self._runner.rope_switch_tokens:
                sequence.embed_again()

    def _end_unsampled(self, plan: Plan, broken: set[str]) -> None:
        """Requests that only wanted their prompt computed."""
        now_s = time.perf_counter()
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.max_tokens == 0 and chunk.stop == sequence.num_tokens and sequence.request_id not in broken:
                self._scheduler.finish(sequence)
                self._answers[sequence.request_id].end(sequence, "length", now_s)

    def _collect(self, answer: Answer) -> list[Event]:
        events = answer.take_events()
        if not answer.open_sequences:
            self._answers.pop(answer.request_id, None)
        return events

    def _fail(self, plan: Plan) -> list[Event]:
        """Fail the requests of a step; of a step that could not even be planned, all that run."""
        sequences = [chunk.sequence for chunk in plan.chunks] or self._scheduler.running
        request_ids = dict.fromkeys(sequence.request_id for sequence in sequences)
        return [event for request_id in request_ids for event in self._fail_request(request_id, _STEP_FAILED)]

    def _fail_all(self) -> list[Event]:
        reason = VariantUnavailable("the engine shut down before the answer was finished", retry_after_s=1.0)
        self._take_in()
        return [event for request_id in list(self._answers) for event in self._fail_request(request_id, reason)]

    def _fail_request(self, request_id: str, error: HalftoneError) -> list[Event]:
        answer = self._answers.pop(request_id, None)
        if answer is None:
            return []
        for sequence in answer.open_sequences:
            self._release(sequence)
        return [Failure(request_id, error)]

    def _release(self, sequence: Sequence) -> None:
        """Free an unfinished sequence's blocks. What lies in them was never seen to be finite, so it is zeroed."""
        blocks = self._scheduler.finish(sequence)
        if blocks:
            self._cache.scrub(blocks)

    def _deliver(self, events: list[Event]) -> None:
        if not events:
            return
        try:
            self._sink(events)
        except Exception:
            _logger.exception("the sink refused %d events", len(events))


_STEP_FAILED = GenerationFailed("the engine failed while it computed this answer; the server's log says why")
_NOT_FINITE = GenerationFailed("the model's output was not a number; the recipe may not suit this model")


def _output_logprobs(logits: Tensor, sequences: list[Sequence], tokens: list[int]) -> dict[int, RowLogprobs]:
    """By row, for the rows that ask for them."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    if not rows:
        return {}
    counts = [sequences[row].params.logprobs or 0 for row in rows]
    return dict(zip(rows, row_logprobs(logits[rows], [tokens[row] for row in rows], counts), strict=True))
