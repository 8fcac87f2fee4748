from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.errors import InvalidRequest
from serve.rollout import Guard, Plan, Shadow, Step, Verdict
from serve.rollout.machine import (
    ENDED,
    MOVES,
    SHADOWING,
    Action,
    Known,
    State,
    actions_of,
    advance,
    canary_weight,
    command,
    start,
)

GUARDS = {"error_rate": Guard(0.01)}
PLAN = Plan("bf16", "int8", steps=(Step(10.0, 100, 60.0), Step(50.0, 100, 60.0)), guards=GUARDS)


def said(result: str) -> Verdict:
    return Verdict(result, f"it is {result}", None, 0.0, 500, 500, ())  # type: ignore[arg-type]


def known(result: str = "inconclusive", n_step: int = 500, **options: object) -> Known:
    return Known(said(result), n_step, ready=True, **options)  # type: ignore[arg-type]


def walk(plan: Plan, *steps: tuple[Known, float]) -> State:
    state = start(0.0)
    for what, now_s in steps:
        state, _ = advance(plan, state, what, now_s)
    return state


READY = (Known(ready=True), 10.0)


def test_a_good_canary_walks_through_all_steps_and_becomes_stable() -> None:
    state, seen = start(0.0), []
    for now_s in range(0, 300, 10):
        state, actions = advance(PLAN, state, known("pass"), float(now_s))
        seen += [(action.kind, action.weight) for action in actions]
    assert state.phase == "succeeded"
    assert seen == [("traffic", 10.0), ("traffic", 50.0), ("promote", 0.0), ("promote", 0.0)]


def test_rollback_follows_a_fail_at_once() -> None:
    state = walk(PLAN, READY)
    state, actions = advance(PLAN, state, known("fail", n_step=1), 11.0)
    assert state.phase == "rolling_back"
    assert state.reason == "it is fail"
    assert actions == (Action("traffic", 0.0),)
    assert advance(PLAN, state, Known(applied=False), 12.0)[0].phase == "rolling_back"
    assert advance(PLAN, state, Known(), 12.0)[0].phase == "rolled_back"


def test_a_canary_that_cannot_be_loaded_again_is_rolled_back() -> None:
    state = walk(PLAN, READY, (known("pass", load_error="out of memory"), 11.0))
    assert state.phase == "rolling_back"
    assert "out of memory" in state.reason


def test_the_last_step_needs_proof_and_earlier_ones_only_the_absence_of_harm() -> None:
    assert walk(PLAN, READY, (known("inconclusive"), 80.0)).step == 1
    assert walk(PLAN, READY, (known("inconclusive"), 80.0), (known("inconclusive"), 1000.0)).phase == "progressing"
    assert walk(PLAN, READY, (known("inconclusive"), 80.0), (known("pass"), 1000.0)).phase == "promoting"


def test_no_step_ends_before_its_samples_and_its_time() -> None:
    assert walk(PLAN, READY, (known("pass", n_step=99), 1000.0)).step == 0
    assert walk(PLAN, READY, (known("pass", n_step=1000), 69.0)).step == 0


def test_without_traffic_it_holds_and_goes_on_when_traffic_returns() -> None:
    quiet = walk(PLAN, READY, (known("no_data", n_step=0), 4000.0))
    assert quiet.phase == "holding"
    assert canary_weight(PLAN, quiet) == 10.0
    assert advance(PLAN, quiet, known("inconclusive"), 5000.0)[0].step == 1


def test_silence_rolls_back_where_the_plan_says_so() -> None:
    plan = Plan("bf16", "int8", guards=GUARDS, on_inconclusive="rollback")
    assert walk(plan, READY, (known("inconclusive", n_step=1), 4000.0)).phase == "rolling_back"


@pytest.mark.parametrize("order", ["pause", None])
def test_guards_are_watched_while_holding_and_while_waiting_for_approval(order: str | None) -> None:
    plan = Plan("bf16", "int8", steps=(Step(10.0, 1, 0.0, gate="approval"), Step(50.0)), guards=GUARDS)
    state = walk(plan, READY, (known(), 11.0))
    assert state.phase == "awaiting_approval"
    if order == "pause":
        state, _ = command(plan, state, "pause", 12.0)
        assert state.phase == "holding"
    assert advance(plan, state, known("fail"), 13.0)[0].phase == "rolling_back"


def test_a_gate_opens_once_by_approval() -> None:
    plan = Plan("bf16", "int8", steps=(Step(10.0, 1, 0.0, gate="approval"), Step(50.0)), guards=GUARDS)
    state = walk(plan, READY, (known(), 11.0))
    assert advance(plan, state, known("pass"), 1e6)[0].phase == "awaiting_approval"
    state, actions = command(plan, state, "promote", 12.0, by="ada")
    assert (state.phase, state.step, actions) == ("progressing", 1, (Action("traffic", 50.0),))


def test_a_paused_rollout_stays_where_it_is_until_resumed() -> None:
    state, actions = command(PLAN, walk(PLAN, READY), "pause", 20.0)
    assert actions == (Action("traffic", 10.0),)
    assert advance(PLAN, state, known("pass"), 1e6)[0].phase == "holding"
    state, _ = command(PLAN, state, "resume", 30.0)
    assert state.phase == "progressing"


def test_shadowing_comes_first_and_serves_nobody() -> None:
    plan = Plan("bf16", "int8", shadow=Shadow(0.2, 100, 60.0), guards=GUARDS)
    state, actions = advance(plan, start(0.0), Known(ready=True), 10.0)
    assert (state.phase, state.step, actions) == ("shadowing", SHADOWING, (Action("traffic", 0.0, 0.2),))
    assert advance(plan, state, known("fail"), 11.0)[0].phase == "rolling_back"
    assert advance(plan, state, known(), 80.0)[1] == (Action("traffic", 5.0, 0.0),)


def test_a_canary_that_cannot_be_loaded_fails_the_rollout_without_touching_traffic() -> None:
    state, actions = advance(PLAN, start(0.0), Known(load_error="out of memory"), 10.0)
    assert (state.phase, actions) == ("failed", ())
    assert "out of memory" in state.reason


def test_the_canary_is_kept_for_inspection_until_its_time_is_over() -> None:
    state = walk(PLAN, READY, (known("fail"), 20.0), (Known(), 21.0))
    assert advance(PLAN, state, Known(), 3620.0)[1] == ()
    freed, actions = advance(PLAN, state, Known(), 3621.0)
    assert actions == (Action("free_canary"),)
    assert advance(PLAN, freed, Known(), 9999.0)[1] == ()


def test_an_ended_rollout_takes_no_orders() -> None:
    state, _ = command(PLAN, walk(PLAN, READY), "abort", 20.0)
    assert state.phase == "aborted"
    for order in ("pause", "resume", "promote", "abort"):
        with pytest.raises(InvalidRequest, match="start a new one"):
            command(PLAN, state, order, 21.0)  # type: ignore[arg-type]


class Walk(RuleBasedStateMachine):
    """Any order of verdicts, counts, orders, restarts and clocks that jump."""

    @initialize(
        weights=st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
        gates=st.lists(st.sampled_from(["none", "approval"]), min_size=4, max_size=4),
        shadow=st.booleans(),
        silence=st.sampled_from(["hold", "rollback"]),
        proof=st.sampled_from(["no_harm", "pass"]),
    )
    def plan_it(self, weights: list[int], gates: list[str], shadow: bool, silence: str, proof: str) -> None:
        steps = tuple(
            Step(float(weight), 10, 30.0, gate=gate, evidence=proof)  # type: ignore[arg-type]
            for weight, gate in zip(sorted(weights), gates, strict=False)
        )
        self.plan = Plan(
            "bf16", "int8", steps, Shadow() if shadow else None, GUARDS, on_inconclusive=silence, patience_s=600.0
        )  # type: ignore[arg-type]
        self.now_s = 0.0
        self.state = start(0.0)
        self.passed_last = False
        self.approved: set[int] = set()

    def move(self, state: State, actions: tuple[Action, ...]) -> None:
        before = self.state
        assert state.phase == before.phase or state.phase in MOVES[before.phase]
        assert state.step in (before.step, before.step + 1)
        assert state.seen_s >= before.seen_s
        for action in actions:
            if action.kind == "traffic":
                assert action.weight == canary_weight(self.plan, state)
        self.state = state

    @rule(
        result=st.sampled_from(["pass", "inconclusive", "no_data"]),
        n=st.integers(0, 30),
        applied=st.booleans(),
        ready=st.booleans(),
        after_s=st.floats(-1e6, 1e6),
    )
    def look(self, result: str, n: int, applied: bool, ready: bool, after_s: float) -> None:
        self.now_s += after_s
        before = self.state
        what = Known(said(result), n, ready, applied=applied)
        state, actions = advance(self.plan, before, what, self.now_s)
        if state.phase == "promoting" and before.phase != "promoting":
            assert result == "pass"
            assert before.step == len(self.plan.steps) - 1
        if state.step > before.step >= 0:
            assert n >= self.plan.steps[before.step].min_samples
            assert self.plan.steps[before.step].gate == "none" or before.step in self.approved
        self.move(state, actions)

    @rule(after_s=st.floats(0, 100))
    def fail(self, after_s: float) -> None:
        self.now_s += after_s
        watched = self.state.phase in ("shadowing", "progressing", "holding", "awaiting_approval", "promoting")
        self.move(*advance(self.plan, self.state, known("fail", n_step=0), self.now_s))
        assert not watched or self.state.phase == "rolling_back"

    @rule(order=st.sampled_from(["pause", "resume", "promote"]), after_s=st.floats(-100, 100))
    def order(self, order: str, after_s: float) -> None:
        self.now_s += after_s
        try:
            state, actions = command(self.plan, self.state, order, self.now_s)  # type: ignore[arg-type]
        except InvalidRequest:
            return
        if order == "promote":
            self.approved.add(self.state.step)
        self.move(state, actions)

    @precondition(lambda self: self.state.phase not in ENDED | {"rolling_back"})
    @rule()
    def abort(self) -> None:
        self.move(*command(self.plan, self.state, "abort", self.now_s))
        assert self.state.phase == "aborted"

    @rule()
    def restart(self) -> None:
        """A new controller knows what was written down, and makes it true again."""
        self.state = State.from_dict(self.state.to_dict())
        for action in actions_of(self.plan, self.state):
            assert action.kind != "traffic" or action.weight == canary_weight(self.plan, self.state)

    @invariant()
    def never_more_canary_than_the_plan_allows(self) -> None:
        if not hasattr(self, "state"):
            return
        weight = canary_weight(self.plan, self.state)
        if self.state.phase in ("promoting", "succeeded"):
            assert weight == 100.0
        elif self.state.phase in ("pending", "rolling_back", "rolled_back", "failed", "aborted"):
            assert weight == 0.0
        else:
            assert weight == (0.0 if self.state.step < 0 else self.plan.steps[self.state.step].weight)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
