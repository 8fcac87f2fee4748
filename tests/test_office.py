"""Whatever happens in whatever order, what is in force adds up, is allowed, and is in the journal before it is true."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import pairwise
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serve.errors import Conflict, VariantUnavailable
from serve.heartbeat import State, VariantState
from serve.office import Office, Scene, Standing
from serve.rollout import Batch, Guard, Outcome, Plan, Shadow, Split, Step, assign
from serve.rollout.machine import MOVES
from serve.rollout.store import Store, StoreUnavailable

CONFIGURED = Split("bf16", {"bf16": 70.0, "int8": 10.0, "nf4": 20.0}, salt="s")
GUARDS = {"error_rate": Guard(0.2)}
PLANS = [
    Plan("bf16", "int8", (Step(10.0, 5, 2.0), Step(50.0, 5, 2.0)), guards=GUARDS, block_s=1.0),
    Plan("bf16", "int8", (Step(30.0, 5, 2.0, gate="approval"),), Shadow(0.5, 5, 2.0), GUARDS, block_s=1.0),
    Plan("bf16", "nf4", (Step(20.0, 5, 2.0),), guards=GUARDS, block_s=1.0, on_inconclusive="rollback", patience_s=50.0),
]


class Flaky(Store):
    """Refuses as often as it is told."""

    refusals = 0

    def _refuse(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise StoreUnavailable("the rollout store does not answer")

    def keep(self, *arguments: Any) -> None:
        self._refuse()
        super().keep(*arguments)

    def commit(self, *arguments: Any) -> None:
        self._refuse()
        super().commit(*arguments)


class Anything(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.store = Flaky("sqlite://")
        self.now_s = 1000.0
        self.offices = 0
        self.sent: list[Batch] = []
        self.records = 0
        self.states: dict[str, State] = dict.fromkeys(CONFIGURED.weights, "ready")
        self.dealt = CONFIGURED
        self.killed()

    @rule()
    def killed(self) -> None:
        """Without a word; the next one waits for its lease to run out."""
        self.offices += 1
        self.office = Office(lambda: self.store, f"office-{self.offices}", CONFIGURED.weights, CONFIGURED, 10)
        self.apply(self.office.recall())

    @rule(plan=st.sampled_from(PLANS))
    def started(self, plan: Plan) -> None:
        if plan.stable == self.dealt.stable:
            self.attempt(lambda: self.office.begin(plan, self.dealt, {}, "ada", self.scene(), self.now_s))

    @rule(order=st.sampled_from(["pause", "resume", "promote", "abort"]))
    def ordered(self, order: Any) -> None:
        if self.office.current:
            id = self.office.current.id
            self.attempt(lambda: self.office.order(id, order, "ada", self.scene(), self.now_s))

    @rule(count=st.integers(0, 30), failing=st.booleans(), after_s=st.floats(0.0, 2.0))
    def evidence(self, count: int, failing: bool, after_s: float) -> None:
        self.now_s += after_s
        outcomes = []
        for _ in range(count):
            self.records += 1
            unit = f"{self.records % 50:016x}"
            variant = assign(self.dealt, unit, "").variant
            error = "internal" if failing and variant != "bf16" else None
            outcomes.append(
                Outcome(self.records, variant, "sticky", self.dealt.revision, self.now_s, unit, self.now_s, error)
            )
        self.sent.append(Batch("ingress", len(self.sent) + 1, self.now_s, tuple(outcomes)))
        self.take(self.sent[-1])

    @rule(index=st.integers(0, 1000))
    def again(self, index: int) -> None:
        """An old parcel, late or for a second time."""
        if self.sent:
            self.take(self.sent[index % len(self.sent)])

    @rule(jump_s=st.one_of(st.floats(0.0, 10.0), st.floats(-500.0, 500.0)))
    def clock(self, jump_s: float) -> None:
        self.now_s += jump_s
        self.apply(self.office.tick(self.scene(), self.now_s))

    @rule(variant=st.sampled_from(["int8", "nf4", "bf16"]))
    def death(self, variant: str) -> None:
        self.apply(self.office.incident(variant, "replica_died", self.scene(), self.now_s))

    @rule(variant=st.sampled_from(["int8", "nf4"]), state=st.sampled_from(["ready", "ready", "loading", "failed"]))
    def loaded(self, variant: str, state: State) -> None:
        self.states[variant] = state

    @rule(count=st.integers(1, 3))
    def unavailable(self, count: int) -> None:
        self.store.refusals = count

    def take(self, parcel: Batch) -> None:
        counted, standing = self.office.take(parcel, self.scene(), self.now_s)
        assert counted or self.office.current is None or not self.office.standing().news
        self.apply(standing)

    def attempt(self, work: Any) -> None:
        with suppress(Conflict, VariantUnavailable):
            work()
        self.apply(self.office.standing())

    def apply(self, standing: Standing) -> None:
        if standing.split and standing.split.revision > self.dealt.revision:
            self.dealt = standing.split

    def scene(self) -> Scene:
        states = {name: VariantState(name, name, state, reason="why") for name, state in self.states.items()}
        return Scene(states, self.dealt.revision)

    @invariant()
    def what_is_dealt_adds_up_and_is_what_the_journal_allows(self) -> None:
        if not hasattr(self, "dealt"):
            return
        assert math.isclose(sum(self.dealt.weights.values()), 100.0)
        records = [record for record in self.store.journal() if record.kind in ("started", "transition")]
        splits = [record.facts["split"] for record in records if record.kind == "transition"]
        assert self.dealt == CONFIGURED or self.dealt.to_dict() in splits
        plans = {record.rollout: record.facts["plan"] for record in records if record.kind == "started"}
        for record in records:
            if record.kind == "transition":
                plan, to = plans[record.rollout], record.facts["to"]
                allowed = max(step["weight"] for step in plan["steps"])
                weight = record.facts["split"]["weights"].get(plan["canary"], 0.0)
                assert weight <= allowed or to in ("promoting", "succeeded")
                assert weight == 0.0 or to not in ("rolling_back", "rolled_back", "aborted", "shadowing")

    @invariant()
    def no_move_is_illegal(self) -> None:
        moves: dict[str, list[Any]] = {}
        for record in self.store.journal() if hasattr(self, "store") else ():
            if record.kind == "transition":
                moves.setdefault(record.rollout, []).append(record.facts)
        for facts in moves.values():
            assert facts[0]["from"] == "pending"
            for move in facts:
                same = move["from"] == move["to"]  # the next step, or freed after its time
                assert same or move["to"] in MOVES[move["from"]]
            assert all(one["to"] == other["from"] for one, other in pairwise(facts))


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
