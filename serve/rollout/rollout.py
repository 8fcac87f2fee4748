"""One rollout as a controller holds it: plan, state, evidence and the split in force, moved together.

Still pure: parcels, times and what is known come in; what changed comes out as entries for the journal, written
before they are acted upon. Times are seconds of the wall clock, as in outcomes. The whole is `to_dict` and back, so
a controller that was killed goes on at the same step with the same evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from serve.errors import ConfigError
from serve.rollout import machine
from serve.rollout.evidence import Evidence, Rules, StepSeen
from serve.rollout.judge import Verdict, judge
from serve.rollout.machine import Action, Command, Known, State, canary_weight
from serve.rollout.outcome import Batch
from serve.rollout.plan import Plan
from serve.rollout.split import Split

__all__ = ["Entry", "Rollout", "deal"]


@dataclass(frozen=True)
class Entry:
    """One line of the journal: a transition, a verdict that changed, or an order. `facts` is JSON-ready."""

    kind: Literal["started", "transition", "verdict", "order"]
    at_s: float
    sentence: str
    facts: Mapping[str, Any]


@dataclass
class Rollout:
    """`base` is the split before the rollout; `split` the one in force, with a rising revision."""

    id: str
    plan: Plan
    base: Split
    split: Split
    state: State
    evidence: Evidence
    created_at_s: float
    verdict: Verdict | None = None

    @classmethod
    def begin(cls, id: str, plan: Plan, base: Split, now_s: float) -> tuple[Rollout, Entry]:
        if plan.stable != base.stable:
            raise ConfigError("rollout.stable", f"{plan.stable!r} is not the stable variant, {base.stable!r} is")
        rules = Rules(plan.stable, plan.canary, plan.deadline_s, plan.settle_s, plan.block_s)
        rollout = cls(id, plan, base, base, machine.start(now_s), Evidence(rules), now_s)
        facts = {"plan": plan.to_dict(), "base": base.to_dict()}
        return rollout, Entry("started", now_s, f"rollout from {plan.stable} to {plan.canary}", facts)

    def take(self, parcel: Batch) -> bool:
        """Evidence from an ingress; False if it was counted before, or nothing is judged any more."""
        return not self.state.ended and self.evidence.take(parcel)

    def tick(
        self, now_s: float, *, ready: bool = True, load_error: str | None = None, applied: bool = True
    ) -> tuple[list[Entry], tuple[Action, ...]]:
        """Judge and move on. Call it once a second, and after every parcel and incident. See `machine.Known`."""
        entries = [] if self.state.ended else self._judge(now_s)
        n_step = self.evidence.n(self.state.step)[0]
        known = Known(self.verdict, n_step, ready, load_error, applied)
        moved, actions = machine.advance(self.plan, self.state, known, now_s)
        return [*entries, *self._move(moved, actions)], actions

    def order(self, order: Command, now_s: float, by: str) -> tuple[list[Entry], tuple[Action, ...]]:
        """A person's order, written down whether or not it moved anything. InvalidRequest if it cannot be followed."""
        moved, actions = machine.command(self.plan, self.state, order, now_s, by=by)
        entry = Entry("order", now_s, f"{order} by {by}", {"command": order, "by": by})
        return [entry, *self._move(moved, actions)], actions

    def supersede(self, canary: str, now_s: float, by: str) -> tuple[list[Entry], tuple[Action, ...]]:
        """End this one for a new target; begin the next with this one's `split` as its base."""
        return self.order("abort", now_s, f"{by} for a rollout to {canary}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "created_at_s": self.created_at_s,
            "plan": self.plan.to_dict(),
            "base": self.base.to_dict(),
            "split": self.split.to_dict(),
            "state": self.state.to_dict(),
            "evidence": self.evidence.to_dict(),
            "verdict": self.verdict and self.verdict.to_dict(),
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Rollout:
        return cls(
            id=mapping["id"],
            created_at_s=mapping["created_at_s"],
            plan=Plan.from_dict(mapping["plan"]),
            base=Split.from_dict(mapping["base"]),
            split=Split.from_dict(mapping["split"]),
            state=State.from_dict(mapping["state"]),
            evidence=Evidence.from_dict(mapping["evidence"]),
            verdict=Verdict.from_dict(mapping["verdict"]) if mapping["verdict"] else None,
        )

    def _judge(self, now_s: float) -> list[Entry]:
        before, self.verdict = self.verdict, judge(self.plan, self.evidence)
        if before and (before.result, before.guard) == (self.verdict.result, self.verdict.guard):
            return []
        return [Entry("verdict", now_s, self.verdict.sentence, self.verdict.to_dict())]

    def _move(self, moved: State, actions: tuple[Action, ...]) -> list[Entry]:
        before, self.state = self.state, moved
        serving = moved.phase in ("shadowing", "progressing")
        new_step = serving and (before.phase == "pending" or before.step != moved.step)
        for action in actions:
            self._deal(action, new_step)
        if (before.phase, before.step, before.freed) == (moved.phase, moved.step, moved.freed):
            return []
        facts = {
            "from": before.phase,
            "to": moved.phase,
            "step": moved.step,
            "weight": canary_weight(self.plan, moved),
            "state": moved.to_dict(),
            "split": self.split.to_dict(),
            "verdict": self.verdict and self.verdict.to_dict(),
        }
        return [Entry("transition", moved.seen_s, moved.reason, facts)]

    def _deal(self, action: Action, new_step: bool) -> None:
        """The split that the action asks for. A new step has a revision of its own, even if it deals as before."""
        if action.kind not in ("traffic", "promote"):
            return
        promoted = action.kind == "promote"
        dealt = deal(self.base, self.plan, action.weight, promoted=promoted, shadow_rate=action.shadow_rate)
        if replace(dealt, revision=self.split.revision) == self.split and not new_step:
            return
        self.split = replace(dealt, revision=self.split.revision + 1)
        if new_step:
            share = 100.0 * dealt.weights[self.plan.canary] / self._both(dealt)
            self.evidence.begin_step(StepSeen(self.state.step, share, self.split.revision, self.state.seen_s))

    def _both(self, split: Split) -> float:
        return split.weights[self.plan.canary] + split.weights[self.plan.stable]


def deal(base: Split, plan: Plan, weight: float, *, promoted: bool = False, shadow_rate: float = 0.0) -> Split:
    """The base split with the canary at `weight` percent of all; other variants keep theirs while there is room.

    The revision is the base's; the caller counts on.
    """
    both = (plan.stable, plan.canary)
    others = {name: value for name, value in base.weights.items() if name not in both}
    if promoted:
        weight = 100.0 - sum(others.values())
    room = 100.0 - weight
    crowd = sum(others.values())
    shrink = min(1.0, room / crowd) if crowd else 1.0
    others = {name: value * shrink for name, value in others.items()}
    rest = max(0.0, room - sum(others.values()))
    order = [*base.weights, *(name for name in both if name not in base.weights)]
    weights = {name: {**others, plan.canary: weight, plan.stable: rest}[name] for name in order}
    shadow = {name: rate for name, rate in base.shadow_rates.items() if name != plan.canary}
    if shadow_rate:
        shadow[plan.canary] = shadow_rate
    stable, canary = (plan.canary, None) if promoted else (plan.stable, plan.canary if weight or shadow_rate else None)
    return replace(base, stable=stable, canary=canary, weights=weights, shadow=shadow)
