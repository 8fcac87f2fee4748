"""The engine without its thread: takes requests, and makes one step at a time: decide, compute, record.

The scheduler decides, the runner computes, answers record. Nothing here waits, locks or is called from two threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from serve.engine.answer import Answer
from serve.engine.architecture import adopt
from serve.engine.blocks import BlockPool
from serve.engine.head import Head
from serve.engine.inputs import StepInputs, make_inputs
from serve.engine.intake import context_tokens, end_token_ids, sequences_of
from serve.engine.kv_cache import KVCache, LayerShape
from serve.engine.memory import free_bytes, is_out_of_memory
from serve.engine.native import NativeRunner, accelerate
from serve.engine.runner import Runner, StepOutputs
from serve.engine.sampler import RowLogprobs, choose, row_logprobs
from serve.engine.scheduler import Chunk, Plan, Scheduler
from serve.engine.sequence import Sequence
from serve.engine.settings import EngineSettings, resolve
from serve.engine.stats import Counters, EngineStats
from serve.engine.vocabulary import Vocabulary
from serve.engine.witness import Witness, show
from serve.errors import GenerationFailed, HalftoneError, OutOfMemory, OutputNotFinite
from serve.generation import Event, Failure, GenerationRequest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["EngineCore"]

_logger = logging.getLogger(__name__)
_SCORED_BYTES = 64 * 2**20
"""Logits of prompt positions that one step may hold: a long prompt times a large vocabulary would be gigabytes."""
_STEP_FAILED = GenerationFailed("the engine failed while it computed this answer; the server's log says why")
_NOT_FINITE = OutputNotFinite("the model's output was not a number; the recipe may not suit this model")
_NO_MEMORY = OutOfMemory("there was no memory left for this answer; fewer sequences at once, or shorter ones, may fit")


class EngineCore:
    """One model with its KV cache, and the answers that are being made. `settings` has every "auto" filled in."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: EngineSettings) -> None:
        self._runner: Runner | NativeRunner
        self._runner, layers = adopt(model)
        stored = [layer.in_int8() for layer in layers] if settings.kv_cache_dtype == "int8" else layers
        config = model.config.get_text_config()
        bytes_per_token = sum(layer.bytes_per_token for layer in stored)
        self.settings = resolve(
            settings,
            context_tokens=context_tokens(config),
            kv_bytes_per_token=bytes_per_token,
            free_bytes=free_bytes(self._runner.device),
        )
        if not self._runner.rope_is_static:
            self.settings = replace(self.settings, prefix_cache=False)
        num_blocks = (self.settings.kv_cache_bytes or 0) // (self.settings.block_size * bytes_per_token)
        self._cache = KVCache(stored, num_blocks, self.settings.block_size)
        self.path = self._quicken(model, layers)
        self._pool = BlockPool(num_blocks)
        self.vocabulary_size = int(config.vocab_size)
        scored_tokens = max(_SCORED_BYTES // (4 * self.vocabulary_size), 1)
        self._scheduler = Scheduler(self.settings, self._pool, max_scored_tokens=scored_tokens)
        self._vocabulary = Vocabulary(tokenizer)
        self._end_ids = end_token_ids(model, self._vocabulary)
        self._answers: dict[str, Answer] = {}
        self._arrivals = 0
        self._counters = Counters()

    def _quicken(self, model: Any, layers: list[LayerShape]) -> str:
        """Take the lean step where it covers the model; one line that says which path runs."""
        if not self.settings.native:
            return "plain path: switched off by the setting `native`"
        threads = self.settings.threads or torch.get_num_threads()
        runner = accelerate(model, layers, self._cache, threads, self._runner.head)
        if isinstance(runner, str):
            return f"plain path: {runner}"
        self._runner = runner
        return "native path"

    @property
    def torch_threads(self) -> int | None:
        """How many threads torch should use on the engine's thread; None leaves its default."""
        # Beside the kernels' own team one: torch's helpers spin for a while after each call, on the team's cores.
        return 1 if isinstance(self._runner, NativeRunner) else self.settings.threads

    @property
    def is_idle(self) -> bool:
        """Whether every answer is finished."""
        return not self._answers

    @property
    def head(self) -> Head | None:
        """The output head, where hidden states of this model can be turned into its logits."""
        return self._runner.head

    @property
    def num_waiting(self) -> int:
        return _num_answering(self._scheduler.waiting)

    def stats(self) -> EngineStats:
        """Counts as of the last step."""
        return EngineStats(
            running=_num_answering(self._scheduler.running),
            waiting=self.num_waiting,
            kv_blocks_used=self._pool.num_used,
            kv_blocks_total=self._pool.num_blocks,
            kv_cache_bytes=self._cache.bytes,
            **asdict(self._counters),
        )

    def kv_cache_resident_bytes(self) -> int:
        """What of the KV cache is held. Walks its pages: milliseconds per gigabyte."""
        return self._cache.resident_bytes()

    def accept(self, request: GenerationRequest, submitted_s: float, witness: Witness | None = None) -> list[Event]:
        """Take in a request that `intake.check` let through. The only event is a failure of ours."""
        try:
            assert request.request_id not in self._answers, "request ids are given out once"
            sequences = sequences_of(request, self.settings, self._arrivals, submitted_s, witness)
            answer = Answer(request, sequences, self._vocabulary, self._end_ids)
        except Exception:
            _logger.exception("a request could not be taken in")
            return [Failure(request.request_id, _STEP_FAILED)]
        self._arrivals += len(sequences)
        self._answers[request.request_id] = answer
        for sequence in sequences:
            self._scheduler.add(sequence)
        return []

    def abort(self, request_id: str) -> list[Event]:
        """End a request's open choices and free their blocks; an unknown one is ignored."""
        answer = self._answers.get(request_id)
        if answer is None:
            return []
        now_s = time.perf_counter()
        for sequence in list(answer.open_sequences):
            self._release(sequence)
            answer.end(sequence, "abort", now_s)
        return list(self._collect([request_id]))

    def step(self) -> list[Event]:
        """One step's events. A step that fails fails its own requests, and the next goes on."""
        plan = Plan(())
        try:
            plan = self._scheduler.schedule()
            if not plan.chunks:
                return []
            self._note(plan)
            inputs = make_inputs(plan.chunks)
            return self._record(plan, inputs, self._runner.run(inputs, self._cache))
        except Exception as error:
            _logger.exception("a step failed")
            return self._fail_step(plan, _NO_MEMORY if is_out_of_memory(error) else _STEP_FAILED)

    def fail_all(self, error: HalftoneError) -> list[Event]:
        """End whatever is open."""
        return self._fail(list(self._answers), error)

    def _note(self, plan: Plan) -> None:
        """Facts that are known once a plan is made."""
        now_s = time.perf_counter()
        self._counters.steps += 1
        self._counters.preemptions += len(plan.preempted)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now_s
                sequence.running_when_scheduled = len(self._scheduler.running)
                sequence.num_reused = chunk.start
                self._counters.prefix_cache_queries += sequence.num_prompt_tokens if self.settings.prefix_cache else 0
                self._counters.prefix_cache_hits += chunk.start
                self._counters.prompt_tokens += sequence.num_prompt_tokens if sequence.choice_index == 0 else 0

    def _record(self, plan: Plan, inputs: StepInputs, outputs: StepOutputs) -> list[Event]:
        logits = outputs.logits
        self._scheduler.record(plan)
        broken = _broken(inputs, outputs)
        events = self._fail(broken, _NOT_FINITE)
        show(inputs, outputs)
        if inputs.scoring:
            self._record_scores(inputs, logits[len(inputs.sampling) :], broken)
        self._record_tokens(inputs, outputs, broken)
        self._end_unsampled(plan, broken)
        events.extend(self._collect(_request_ids(plan.chunks)))
        return events

    def _record_scores(self, inputs: StepInputs, logits: Tensor, broken: set[str]) -> None:
        row = 0
        for chunk in inputs.scoring:
            sequence, rows = chunk.sequence, logits[row : row + len(chunk.scored)]
            row += len(chunk.scored)
            if sequence.request_id not in broken and not sequence.only_scores:
                targets = sequence.tokens[chunk.scored.start + 1 : chunk.scored.stop + 1]
                count = sequence.params.prompt_logprobs or 0
                self._answers[sequence.request_id].score(row_logprobs(rows, targets, [count] * len(targets)))

    def _record_tokens(self, inputs: StepInputs, outputs: StepOutputs, broken: set[str]) -> None:
        sequences = [chunk.sequence for chunk in inputs.sampling]
        if not sequences:
            return
        logits = outputs.logits[: len(sequences)] if inputs.scoring else outputs.logits
        for sequence in sequences:
            if sequence.request_id not in broken:
                self._scheduler.register(sequence)
        tokens = choose(logits, sequences, sorted(self._end_ids), outputs.best)
        logprobs = _output_logprobs(logits, sequences, tokens)
        now_s = time.perf_counter()
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            if sequence.request_id in broken:
                continue
            sequence.tokens.append(token)
            self._counters.generation_tokens += 1
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
                if sequence.only_scores:
                    self._release(sequence)  # whether its numbers were finite is for the witness to say
                else:
                    self._scheduler.finish(sequence)
                self._answers[sequence.request_id].end(sequence, "length", now_s)

    def _collect(self, request_ids: Iterable[str]) -> Iterator[Event]:
        """What those requests have to say, and forget the ones that are finished."""
        for request_id in request_ids:
            answer = self._answers.get(request_id)
            if answer is not None:
                yield from answer.take_events()
                if not answer.open_sequences:
                    del self._answers[request_id]

    def _fail_step(self, plan: Plan, error: HalftoneError) -> list[Event]:
        """Fail the requests of a step; of a step that could not even be planned, all that are open."""
        return self._fail(_request_ids(plan.chunks) or list(self._answers), error)

    def _fail(self, request_ids: Iterable[str], error: HalftoneError) -> list[Event]:
        failed = [request_id for request_id in request_ids if request_id in self._answers]
        for request_id in failed:
            for sequence in self._answers.pop(request_id).open_sequences:
                self._release(sequence)
        return [Failure(request_id, error) for request_id in failed]

    def _release(self, sequence: Sequence) -> None:
        """Free an unfinished sequence's blocks. What lies in them was never seen to be finite, so it is zeroed."""
        blocks = self._scheduler.finish(sequence)
        if blocks:
            self._cache.scrub(blocks)


def _request_ids(chunks: Iterable[Chunk]) -> list[str]:
    return list(dict.fromkeys(chunk.sequence.request_id for chunk in chunks))


def _broken(inputs: StepInputs, outputs: StepOutputs) -> set[str]:
    """Requests whose logits are not finite."""
    best = outputs.best
    finite = outputs.logits.amax(-1).isfinite().tolist() if best is None else [token >= 0 for token in best]
    if all(finite):
        return set()
    owners = [chunk.sequence.request_id for chunk in inputs.sampling]
    owners += [chunk.sequence.request_id for chunk in inputs.scoring for _ in chunk.scored]
    excused = {chunk.sequence.request_id for chunk in inputs.scoring if chunk.sequence.only_scores}
    return {owner for owner, good in zip(owners, finite, strict=True) if not good} - excused


def _num_answering(sequences: Iterable[Sequence]) -> int:
    """Those that somebody waits for."""
    return sum(not sequence.only_scores for sequence in sequences)


def _output_logprobs(logits: Tensor, sequences: list[Sequence], tokens: list[int]) -> dict[int, RowLogprobs]:
    """By row, for the rows that ask for them."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    if not rows:
        return {}
    counts = [sequences[row].params.logprobs or 0 for row in rows]
    return dict(zip(rows, row_logprobs(logits[rows], [tokens[row] for row in rows], counts), strict=True))
