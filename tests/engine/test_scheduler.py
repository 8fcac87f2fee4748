from __future__ import annotations

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.engine.blocks import NULL_BLOCK, BlockPool, blocks_for
from serve.engine.scheduler import Chunk, Plan, Scheduler
from serve.engine.sequence import Sequence
from serve.engine.settings import EngineSettings
from serve.generation import SamplingParams

BLOCK, BLOCKS, LONGEST = 4, 12, 40


def settings(**changes: int) -> EngineSettings:
    limits = {"max_num_seqs": 5, "max_num_batched_tokens": 16, "max_prefill_tokens_beside_decode": 6}
    return EngineSettings(**limits | {"block_size": BLOCK} | changes)


def sequence(arrival: int, prompt: int, output: int = 10, *, priority: int = 0, scored: bool = False) -> Sequence:
    params = SamplingParams(prompt_logprobs=0 if scored else None)
    return Sequence(f"r{arrival}", 0, [1] * prompt, prompt, params, output, arrival, priority)


def run(scheduler: Scheduler) -> Plan:
    """A step in which every token is computed and sampled."""
    plan = scheduler.schedule()
    scheduler.record(plan)
    for chunk in plan.chunks:
        if chunk.samples:
            chunk.sequence.tokens.append(1)
    return plan


def lengths(plan: Plan) -> dict[int, int]:
    return {chunk.sequence.arrival: chunk.length for chunk in plan.chunks}


def test_a_long_prompt_is_computed_in_chunks_beside_decode() -> None:
    scheduler = Scheduler(settings(), BlockPool(BLOCKS))
    scheduler.add(sequence(0, 3))
    assert lengths(run(scheduler)) == {0: 3}
    scheduler.add(sequence(1, 14))
    assert lengths(run(scheduler)) == {0: 1, 1: 6}
    assert lengths(run(scheduler)) == {0: 1, 1: 6}
    assert lengths(run(scheduler)) == {0: 1, 1: 2}
    assert lengths(run(scheduler)) == {0: 1, 1: 1}


def test_a_prompt_alone_takes_the_whole_budget() -> None:
    scheduler = Scheduler(settings(), BlockPool(BLOCKS))
    scheduler.add(sequence(0, 20))
    assert lengths(run(scheduler)) == {0: 16}


def test_the_youngest_is_preempted_and_comes_back_first_among_equals() -> None:
    scheduler = Scheduler(settings(), BlockPool(4))
    old, young = sequence(0, 4), sequence(1, 8)
    scheduler.add(old)
    scheduler.add(young)
    scheduler.add(sequence(2, 4))
    run(scheduler)  # blocks: one for the old, two for the young; the last is for them to grow into, so the third waits
    plan = scheduler.schedule()
    assert [s.arrival for s in plan.preempted] == [1]
    assert [s.arrival for s in scheduler.waiting] == [1, 2]
    assert (young.num_computed, young.blocks) == (0, [])
    assert young.num_tokens == 9, "what it had said stays said"
    assert lengths(plan) == {0: 1}


def test_lower_priority_numbers_go_first_and_are_preempted_last() -> None:
    scheduler = Scheduler(settings(max_num_seqs=1), BlockPool(BLOCKS))
    scheduler.add(sequence(0, 3, priority=1))
    scheduler.add(sequence(1, 3, priority=0))
    assert lengths(run(scheduler)) == {1: 3}


def test_a_user_takes_the_place_of_work_that_yields() -> None:
    scheduler = Scheduler(settings(max_num_seqs=1), BlockPool(BLOCKS))
    scheduler.add(sequence(0, 3, priority=1))
    run(scheduler)
    scheduler.add(sequence(1, 3, priority=0))
    assert lengths(run(scheduler)) == {1: 3}
    assert [s.arrival for s in scheduler.waiting] == [0]


def test_a_scored_prompt_is_cut_to_what_its_logits_may_take() -> None:
    scheduler = Scheduler(settings(), BlockPool(BLOCKS), max_scored_tokens=4)
    scheduler.add(sequence(0, 10, scored=True))
    scored = [position for _ in range(3) for chunk in run(scheduler).chunks for position in chunk.scored]
    assert scored == list(range(9))


def test_a_prompt_that_is_computed_again_is_scored_once() -> None:
    scheduler = Scheduler(settings(), BlockPool(BLOCKS))
    scored = sequence(0, 10, scored=True)
    scheduler.add(scored)
    run(scheduler)
    scheduler.preempt(scored)
    assert [len(chunk.scored) for chunk in run(scheduler).chunks] == [0]


@pytest.mark.parametrize("tokens", [0, 1, 4, 5])
def test_blocks_for_rounds_up(tokens: int) -> None:
    assert blocks_for(tokens, 4) * 4 >= tokens > (blocks_for(tokens, 4) - 1) * 4


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps and aborts: nothing is lost, shared, over budget or starved."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.settings = settings()
        self.scheduler = Scheduler(self.settings, self.pool, max_scored_tokens=5)
        self.open: list[Sequence] = []
        self.arrivals = 0

    @rule(
        prompt=st.integers(1, LONGEST - 8),
        output=st.integers(0, 8),
        priority=st.integers(0, 1),
        scored=st.booleans(),
    )
    def arrive(self, prompt: int, output: int, priority: int, scored: bool) -> None:
        new = sequence(self.arrivals, prompt, output, priority=priority, scored=scored)
        self.arrivals += 1
        self.open.append(new)
        self.scheduler.add(new)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self._close(data.draw(st.sampled_from(self.open)))

    @precondition(lambda self: self.open)
    @rule()
    def step(self) -> None:
        self._step()

    @precondition(lambda self: self.open)
    @rule()
    def drain(self) -> None:
        for _ in range(sum(s.num_tokens + s.max_tokens for s in self.open) * 4):
            if not self.open:
                return
            self._step()
        raise AssertionError("a sequence never finishes")

    def _step(self) -> None:
        first = min(self.open, key=lambda s: s.rank)
        was_running = first in self.scheduler.running
        plan = self.scheduler.schedule()
        moved = first in [chunk.sequence for chunk in plan.chunks]
        assert moved or (plan.preempted and not was_running), "the first in rank always moves, or does next"
        self._check(plan)
        self.scheduler.record(plan)
        for chunk in plan.chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(1)
            done = chunk.sequence.num_output_tokens >= chunk.sequence.max_tokens
            if done and chunk.stop >= chunk.sequence.num_prompt_tokens:
                self._close(chunk.sequence)

    def _check(self, plan: Plan) -> None:
        assert sum(chunk.length for chunk in plan.chunks) <= self.settings.max_num_batched_tokens
        assert sum(len(chunk.scored) for chunk in plan.chunks) <= 5
        for chunk in plan.chunks:
            self._check_chunk(chunk)

    def _check_chunk(self, chunk: Chunk) -> None:
        owner = chunk.sequence
        assert chunk.length > 0
        assert chunk.start == owner.num_computed
        assert chunk.stop <= owner.num_tokens
        assert len(owner.blocks) * BLOCK >= chunk.stop
        assert chunk.samples == (chunk.stop == owner.num_tokens and owner.max_tokens > 0)

    def _close(self, done: Sequence) -> None:
        self.open.remove(done)
        self.scheduler.finish(done)

    @invariant()
    def every_sequence_is_in_one_place(self) -> None:
        held = self.scheduler.waiting + self.scheduler.running
        assert sorted(id(s) for s in held) == sorted(id(s) for s in self.open)
        assert len(self.scheduler.running) <= self.settings.max_num_seqs
        assert self.scheduler.running == sorted(self.scheduler.running, key=lambda s: s.rank)

    @invariant()
    def every_block_has_one_owner(self) -> None:
        owned = [block for s in self.open for block in s.blocks]
        assert len(owned) == len(set(owned)) == self.pool.num_used
        assert NULL_BLOCK not in owned
        assert all(not s.blocks for s in self.scheduler.waiting)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = hypothesis_settings(max_examples=30, stateful_step_count=25, deadline=None)
