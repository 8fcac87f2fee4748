"""Decides what the next step computes. Pure Python over sequences and blocks; knows no tensor and no clock.

Continuous batching (Orca, OSDI 2022) over paged blocks (arXiv 2309.06180) with chunked prefill (arXiv 2308.16369):
every running sequence gets its next token each step, what is left of the token budget goes to prompts in chunks, and
a sequence that needs a block when none is free preempts the youngest one, which later computes its tokens again.
A sequence whose beginning lies in registered blocks starts behind it (see `blocks`), and the further choices of a
request wait until the first has computed their common prompt.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from heapq import merge

from serve.engine.blocks import BlockPool, blocks_for
from serve.engine.prefix import block_keys
from serve.engine.sequence import Sequence
from serve.engine.settings import EngineSettings

__all__ = ["Chunk", "Plan", "Scheduler"]

_SCORED_BESIDE_DECODE = 32
"""Tokens per step that are scored for nobody's answer while others decode: they must hardly notice."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start .. start + length` of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    length: int
    samples: bool
    """Whether its last position predicts a token that is not known yet."""
    scored: range = range(0)
    """Prompt positions whose logits are wanted: for prompt logprobs, or by a witness."""
    kept: range = range(0)
    """Positions whose hidden states a witness wants."""

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's work, and the sequences that lost their blocks so that it fits."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[Sequence, ...] = ()


class Scheduler:
    """Holds every sequence that is not finished. `schedule` decides, `record` notes that it was done."""

    def __init__(self, settings: EngineSettings, pool: BlockPool, *, max_scored_tokens: int = 256) -> None:
        self._settings = settings
        self._block_size = settings.block_size
        self._pool = pool
        self._max_scored_tokens = max_scored_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        """Both in order of rank."""

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)

    def finish(self, sequence: Sequence) -> list[int]:
        """Forget a sequence, finished or aborted; returns the blocks it gave back that nobody can read any more."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        return self._release(sequence)

    def schedule(self) -> Plan:
        """The next step's chunks: decodes first, then prompts by rank, whether they were begun or wait."""
        step = _Step(self._settings, self._max_scored_tokens)
        for sequence in [s for s in self.running if s.num_pending == 1]:
            self._plan_running(step, sequence)
        begun = [s for s in self.running if s.num_pending > 1]
        # Where blocks ran out, whoever waits would take those that were just given up.
        waiting = [] if step.preempted else self.waiting[: self._settings.max_num_seqs]
        blocked = False
        for sequence in merge(begun, waiting, key=_rank):
            if sequence.only_scores and (blocked or step.computes_prompts):
                continue  # it yields to everybody who waits for a first token
            if sequence in begun:
                self._plan_running(step, sequence)
            elif not self._awaits_leader(sequence):
                overtakes = any(victim.rank < sequence.rank for victim in step.preempted)
                blocked = blocked or overtakes or not self._admit(step, sequence)
        return Plan(tuple(step.chunks.values()), tuple(step.preempted))

    def record(self, plan: Plan) -> None:
        """Note that the plan's tokens are in the KV cache now."""
        for chunk in plan.chunks:
            chunk.sequence.num_computed = chunk.stop
            chunk.sequence.num_scored = max(chunk.sequence.num_scored, chunk.scored.stop)
            chunk.sequence.num_kept = max(chunk.sequence.num_kept, chunk.kept.stop)

    def register(self, sequence: Sequence) -> None:
        """Its logits were finite, so what it has computed may be read by others: every full block of it."""
        full = sequence.num_computed // self._block_size
        if not self._settings.prefix_cache or full <= sequence.num_registered:
            return
        keys = block_keys(sequence, self._block_size, full)
        for index in range(sequence.num_registered, full):
            self._pool.register(sequence.blocks[index], keys[index])
        sequence.num_registered = full

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits at its rank and computes its tokens again."""
        self.running.remove(sequence)
        self._release(sequence)
        self.add(sequence)

    def _plan_running(self, step: _Step, sequence: Sequence) -> None:
        # An earlier sequence of this step may have preempted this one.
        length = step.affordable(sequence) if sequence in self.running else 0
        if length and self._make_room(step, sequence):
            step.take(sequence, length)

    def _make_room(self, step: _Step, sequence: Sequence) -> bool:
        """Blocks for all known tokens, from younger sequences if need be; False if it had to give up its own."""
        missing = blocks_for(sequence.num_tokens, self._block_size) - len(sequence.blocks)
        while missing > self._pool.num_free:
            victim = self.running[-1]
            step.drop(victim)
            self.preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self._pool.allocate(max(missing, 0))
        return True

    def _admit(self, step: _Step, sequence: Sequence) -> bool:
        """Let the first that waits run, or say that it must wait on: nobody overtakes it."""
        self._reuse(sequence)
        length = step.affordable(sequence)
        # Blocks for all known tokens at once: a prompt that was begun never waits for blocks in the middle.
        needed = blocks_for(sequence.num_tokens, self._block_size) - len(sequence.blocks)
        if not length or not self._make_way(step, sequence, needed):
            self._release(sequence)
            return False
        self.waiting.remove(sequence)
        sequence.blocks += self._pool.allocate(needed)
        insort(self.running, sequence, key=_rank)
        step.take(sequence, length)
        return True

    def _awaits_leader(self, sequence: Sequence) -> bool:
        """Whether another choice of its request is just computing full blocks that it could read."""
        leader = sequence.leader
        return (
            leader is not None
            and self._settings.prefix_cache
            and leader in self.running
            and leader.num_computed < leader.num_prompt_tokens
            and sequence.num_prompt_tokens > self._block_size
        )

    def _reuse(self, sequence: Sequence) -> None:
        """Begin behind the blocks that are there. The last token is computed in any case: its logits are wanted."""
        unscored = sequence.scores_prompt and sequence.num_scored < sequence.num_prompt_tokens - 1
        if unscored or not self._settings.prefix_cache:
            return
        keys = block_keys(sequence, self._block_size, (sequence.num_tokens - 1) // self._block_size)
        sequence.blocks = self._pool.find(keys)
        self._pool.share(sequence.blocks)
        sequence.num_registered = len(sequence.blocks)
        sequence.num_computed = len(sequence.blocks) * self._block_size

    def _make_way(self, step: _Step, sequence: Sequence, needed: int) -> bool:
        """A place and `needed` blocks for a sequence that waits, if need be from those of lower priority."""
        yielding = [s for s in self.running if s.priority > sequence.priority]
        staying = len(self.running) - len(yielding)
        # Those who stay keep a block each to grow into, or the newcomer would soon be preempted again.
        wanted = needed + staying
        if staying >= self._settings.max_num_seqs:
            return False
        if self._pool.num_free + self._pool.num_freed_by(s.blocks for s in yielding) < wanted:
            return False
        while len(self.running) >= self._settings.max_num_seqs or self._pool.num_free < wanted:
            victim = yielding.pop()
            step.drop(victim)
            self.preempt(victim)
        return True

    def _release(self, sequence: Sequence) -> list[int]:
        blocks, sequence.blocks, sequence.num_computed, sequence.num_registered = sequence.blocks, [], 0, 0
        return self._pool.free(blocks)


class _Step:
    """The plan while it grows, with what is left of the step's token budgets."""

    def __init__(self, settings: EngineSettings, max_scored_tokens: int) -> None:
        self._tokens = settings.max_num_batched_tokens
        self._prefill_beside_decode = settings.max_prefill_tokens_beside_decode
        self._scored = max_scored_tokens
        self._prefill_used = 0
        self._decodes = False
        self.computes_prompts = False
        self.chunks: dict[Sequence, Chunk] = {}
        self.preempted: list[Sequence] = []

    def affordable(self, sequence: Sequence) -> int:
        """How many of the sequence's pending tokens the budgets still allow; 0 for none."""
        if sequence.num_pending == 1:
            return min(1, self._tokens)
        limits = [sequence.num_pending, self._tokens]
        if self._decodes:
            limits.append(self._prefill_beside_decode - self._prefill_used)
        if sequence.scores_prompt:
            limits.append(self._scored)
        if sequence.only_scores and self._decodes:
            limits.append(_SCORED_BESIDE_DECODE - self._prefill_used)
        return max(min(limits), 0)

    def take(self, sequence: Sequence, length: int) -> None:
        chunk = _chunk(sequence, length)
        self.chunks[sequence] = chunk
        self._tokens -= length
        self._scored -= len(chunk.scored)
        if sequence.num_pending == 1:
            self._decodes = True
        else:
            self._prefill_used += length
            self.computes_prompts |= not sequence.only_scores

    def drop(self, victim: Sequence) -> None:
        self.chunks.pop(victim, None)
        self.preempted.append(victim)


def _chunk(sequence: Sequence, length: int) -> Chunk:
    start, stop = sequence.num_computed, sequence.num_computed + length
    scored, kept = range(0), range(0)
    if sequence.scores_prompt:
        # Position p predicts token p + 1; the last prompt token predicts the first output token.
        first = max(start, sequence.num_scored, sequence.first_scored)
        scored = range(first, max(first, min(stop, sequence.num_prompt_tokens - 1)))
    if sequence.keeps_hidden:
        first = max(start, sequence.num_kept)
        kept = range(first, max(first, stop))
    samples = stop == sequence.num_tokens and sequence.max_tokens > 0
    return Chunk(sequence, start, length, samples=samples, scored=scored, kept=kept)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
