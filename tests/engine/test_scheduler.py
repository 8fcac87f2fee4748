from __future__ import annotations

from collections import Counter

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


def sequence(
    arrival: int, prompt: int, output: int = 10, *, priority: int = 0, scored: bool = False, text: int | None = None
) -> Sequence:
    """text: sequences of the same text begin alike; by default each has its own."""
    params = SamplingParams(prompt_logprobs=0 if scored else None)
    tokens = [arrival if text is None else text] * prompt
    return Sequence(f"r{arrival}", 0, tokens, prompt, params, output, arrival, priority)


def run(scheduler: Scheduler) -> Plan:
    """A step in which every token is computed and sampled."""
    plan = scheduler.schedule()
    scheduler.record(plan)
    for chunk in plan.chunks:
        if chunk.samples:
            scheduler.register(chunk.sequence)
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


def test_a_beginning_that_was_computed_is_not_computed_again() -> None:
    scheduler = Scheduler(settings(), BlockPool(BLOCKS))
    first, second = sequence(0, 10, text=7), sequence(1, 14, text=7)
    scheduler.add(first)
    run(scheduler)
    scheduler.add(second)
    assert lengths(run(scheduler)) == {0: 1, 1: 6}
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2], "a block that is not full is its owner's alone"


def test_a_whole_prompt_that_is_known_still_computes_its_last_token() -> None:
    scheduler = Scheduler(settings(), BlockPool(BLOCKS))
    for arrival in range(2):
        scheduler.add(sequence(arrival, 8, text=7))
        plan = run(scheduler)
    assert lengths(plan) == {0: 1, 1: 4}


def test_blocks_of_a_finished_text_are_found_until_their_memory_is_needed() -> None:
    pool = BlockPool(BLOCKS)
    scheduler = Scheduler(settings(), pool)
    done = sequence(0, 12, text=7)
    scheduler.add(done)
    run(scheduler)
    scheduler.finish(done)
    assert pool.num_used == 0
    again = sequence(1, 12, text=7)
    scheduler.add(again)
    assert lengths(run(scheduler)) == {1: 4}
    scheduler.finish(again)
    crowd = sequence(2, 15 * 3)
    crowd.max_tokens = 1
    scheduler.add(crowd)
    while crowd.num_pending != 1:
        run(scheduler)
    scheduler.finish(crowd)
    late = sequence(3, 12, text=7)
    scheduler.add(late)
    assert lengths(run(scheduler)) == {3: 12}


def test_other_salts_share_nothing() -> None:
    scheduler = Scheduler(settings(), BlockPool(BLOCKS))
    for arrival, salt in enumerate("ab"):
        new = sequence(arrival, 8, text=7)
        new.cache_salt = salt
        scheduler.add(new)
        plan = run(scheduler)
    assert lengths(plan) == {0: 1, 1: 6}


def test_further_choices_wait_for_the_first_to_compute_their_prompt_and_let_others_pass() -> None:
    scheduler = Scheduler(settings(max_num_batched_tokens=20), BlockPool(BLOCKS))
    leader, follower, other = sequence(0, 14, text=7), sequence(1, 14, text=7), sequence(2, 3)
    follower.leader = leader
    for new in (leader, follower, other):
        scheduler.add(new)
    assert lengths(run(scheduler)) == {0: 14, 2: 3}
    assert lengths(run(scheduler)) == {0: 1, 2: 1, 1: 2}


def test_a_further_choice_does_not_overtake_the_first_that_has_just_lost_its_blocks() -> None:
    scheduler = Scheduler(settings(), BlockPool(BLOCKS), max_scored_tokens=5)
    urgent, leader = sequence(0, 12, 2, text=7), sequence(2, 25, 0, priority=1, scored=True, text=7)
    for first in (urgent, leader):
        follower = sequence(first.arrival + 1, len(first.tokens), first.max_tokens, priority=first.priority, text=7)
        follower.leader = first
        scheduler.add(first)
        scheduler.add(follower)
    assert lengths(run(scheduler)) == {0: 12, 2: 4}
    plan = run(scheduler)  # the urgent request's second choice takes the blocks of the other request's first
    assert plan.preempted == (leader,)
    assert set(lengths(plan)) == {0, 1}


def test_a_scored_prompt_reads_no_blocks_for_every_position_has_logits_to_give() -> None:
    scheduler = Scheduler(settings(), BlockPool(BLOCKS))
    for arrival, scored in enumerate((False, True)):
        scheduler.add(sequence(arrival, 8, text=7, scored=scored))
        plan = run(scheduler)
    assert [list(chunk.scored) for chunk in plan.chunks if chunk.sequence.arrival == 1] == [list(range(6))]


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
        text=st.integers(0, 2),
        choices=st.integers(1, 2),
    )
    def arrive(self, prompt: int, output: int, priority: int, scored: bool, text: int, choices: int) -> None:
        leader = None
        for _ in range(choices):
            new = sequence(self.arrivals, prompt, output, priority=priority, scored=scored and not leader, text=text)
            new.leader, leader = leader, leader or new
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
        # While one waits for its leader to compute what both can read, others may pass; then it waits for their blocks.
        passed = first.leader and any(s is not first and s.priority <= first.priority for s in self.scheduler.running)
        assert moved or (not was_running and (plan.preempted or passed)), "the first in rank always moves, or does next"
        self._check(plan)
        self.scheduler.record(plan)
        for chunk in plan.chunks:
            if chunk.samples:
                self.scheduler.register(chunk.sequence)
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
    def every_block_is_free_or_owned_and_only_equal_beginnings_share_one(self) -> None:
        owned = {block for s in self.open for block in s.blocks}
        assert len(owned) == self.pool.num_used
        assert NULL_BLOCK not in owned
        assert all(not s.blocks for s in self.scheduler.waiting)
        texts: dict[int, list[int]] = {}
        for s in self.open:
            for index, block in enumerate(s.blocks):
                text = s.tokens[: (index + 1) * BLOCK]
                assert texts.setdefault(block, text) == text, "two texts in one block"
            assert len(set(s.blocks)) == len(s.blocks)

    @invariant()
    def nobody_writes_into_a_block_that_others_read(self) -> None:
        holders = Counter(block for s in self.open for block in s.blocks)
        for s in self.scheduler.running:
            writes = s.blocks[s.num_computed // BLOCK :]
            assert all(holders[block] == 1 for block in writes)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = hypothesis_settings(max_examples=30, stateful_step_count=25, deadline=None)
