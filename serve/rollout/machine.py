"""The rollout as a state machine: pure (state, what is known, now) -> (state, actions).

    pending -> shadowing -> progressing <-> holding          (holding: paused, undecided, or without traffic)
                  |             |    \\ awaiting_approval
                  |             |           |
                  |             +-----> promoting -> succeeded
                  +-> rolling_back -> rolled_back
    from everywhere that is not the end: failed (the canary could not be loaded), aborted (a person; weights go back)

Guards are watched wherever the canary may see traffic: also while holding, waiting for approval or promoting. Nothing
here acts: the controller applies the actions, and reports back what has become true (`Known`). Applying an action
twice does no harm, so a controller that was killed in between repeats it. Time never runs backwards here: a clock that
jumps back is held at the last time seen, one that jumps forward can end a wait early, but a wait is never all that a
promotion needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from serve.errors import InvalidRequest
from serve.rollout.judge import Verdict
from serve.rollout.plan import Plan, Shadow, Step

__all__ = [
    "ENDED", "MOVES", "SHADOWING", "Action", "Command", "Known", "Phase", "State", "actions_of", "advance",
    "canary_weight", "command", "start",
]  # fmt: skip

Phase = Literal[
    "pending", "shadowing", "progressing", "holding", "awaiting_approval", "promoting", "succeeded", "rolling_back",
    "rolled_back", "failed", "aborted",
]  # fmt: skip
Command = Literal["pause", "resume", "promote", "abort"]

ENDED: Final[frozenset[Phase]] = frozenset({"succeeded", "rolled_back", "failed", "aborted"})
_WATCHED: Final[frozenset[Phase]] = frozenset({"shadowing", "progressing", "holding", "awaiting_approval"})
SHADOWING: Final = -1

# Every move there is; a test walks the machine at random and holds it to this table.
MOVES: Final[Mapping[Phase, frozenset[Phase]]] = {
    "pending": frozenset({"shadowing", "progressing", "failed", "aborted"}),
    "shadowing": frozenset({"progressing", "holding", "awaiting_approval", "rolling_back", "aborted"}),
    "progressing": frozenset({"holding", "awaiting_approval", "promoting", "rolling_back", "aborted"}),
    "holding": frozenset({"shadowing", "progressing", "awaiting_approval", "promoting", "rolling_back", "aborted"}),
    "awaiting_approval": frozenset({"progressing", "holding", "promoting", "rolling_back", "aborted"}),
    "promoting": frozenset({"succeeded", "rolling_back", "aborted"}),
    "rolling_back": frozenset({"rolled_back"}),
    "succeeded": frozenset(),
    "rolled_back": frozenset(),
    "failed": frozenset(),
    "aborted": frozenset(),
}


@dataclass(frozen=True)
class Action:
    """One thing for the controller to make true.

    traffic: canary weight 0-100 and shadow rate 0-1, the rest to stable. promote: the canary becomes stable.
    free_stable, free_canary: end that variant's replicas. Idempotent, all of them.
    """

    kind: Literal["traffic", "promote", "free_stable", "free_canary"]
    weight: float = 0.0
    shadow_rate: float = 0.0


@dataclass(frozen=True)
class Known:
    """What the controller sees when it asks for the next move.

    n_step: finished canary requests in this step. ready: the canary can serve. load_error: why it never will.
    applied: the last traffic or promote action is in force at every ingress.
    """

    verdict: Verdict | None = None
    n_step: int = 0
    ready: bool = False
    load_error: str | None = None
    applied: bool = True


@dataclass(frozen=True)
class State:
    """Where a rollout stands. `step` is SHADOWING (-1) or an index into the plan's steps; `reason` is for people."""

    phase: Phase = "pending"
    step: int = SHADOWING
    reason: str = ""
    started_at_s: float = 0.0
    step_since_s: float = 0.0
    since_s: float = 0.0
    seen_s: float = 0.0
    paused: bool = False
    approved_step: int | None = None
    freed: bool = False

    @property
    def ended(self) -> bool:
        return self.phase in ENDED

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> State:
        return cls(**mapping)


Move = tuple[State, tuple[Action, ...]]


def start(now_s: float) -> State:
    return State(since_s=now_s, seen_s=now_s, reason="waiting for the canary to be ready")


def canary_weight(plan: Plan, state: State) -> float:
    """The share of users, 0-100, that the canary may have in this state. 100 only once it is promoted."""
    if state.phase in ("promoting", "succeeded"):
        return 100.0
    if state.phase in _WATCHED and state.step >= 0:
        return plan.steps[state.step].weight
    return 0.0


def advance(plan: Plan, state: State, known: Known, now_s: float) -> Move:
    """The next move, or the same state when nothing is due. Call it once a second, and whenever something happened."""
    now_s = max(now_s, state.seen_s)
    state = replace(state, seen_s=now_s)
    if state.phase == "pending":
        return _begin(plan, state, known, now_s)
    if state.phase in _WATCHED:
        return _watch(plan, state, known, now_s)
    if state.phase == "promoting" and known.verdict and known.verdict.result == "fail":
        return _to(plan, state, "rolling_back", known.verdict.sentence, now_s)
    if state.phase == "promoting" and known.applied:
        freed = (Action("free_stable"),) if plan.free_stable else ()
        return _to(plan, state, "succeeded", f"{plan.canary} is the stable variant now", now_s, freed)
    if state.phase == "rolling_back" and known.applied:
        return _to(plan, state, "rolled_back", state.reason, now_s)
    kept = state.phase in ("rolled_back", "aborted") and not state.freed
    if kept and now_s - state.since_s >= plan.keep_canary_s:
        return replace(state, freed=True), (Action("free_canary"),)
    return state, ()


def command(plan: Plan, state: State, order: Command, now_s: float, *, by: str = "operator") -> Move:
    """What a person asks for. InvalidRequest where it means nothing in this state."""
    now_s = max(now_s, state.seen_s)
    state = replace(state, seen_s=now_s)
    if state.ended or state.phase == "rolling_back":
        raise InvalidRequest(f"the rollout is {state.phase}: start a new one", param="command")
    if order == "abort":
        return _to(plan, state, "aborted", f"aborted by {by}", now_s)
    if state.phase in ("pending", "promoting"):
        raise InvalidRequest(f"cannot {order} while {state.phase}", param="command")
    if order == "pause":
        return _hold(plan, replace(state, paused=True), f"paused by {by}", now_s)
    if order == "resume":
        if state.phase != "holding":
            raise InvalidRequest(f"nothing to resume: the rollout is {state.phase}", param="command")
        return _resume(plan, replace(state, paused=False, step_since_s=now_s), f"resumed by {by}", now_s)
    return _approve(plan, state, now_s, by)


def _begin(plan: Plan, state: State, known: Known, now_s: float) -> Move:
    if known.load_error:
        return _to(plan, state, "failed", f"{plan.canary} cannot be loaded: {known.load_error}", now_s)
    if now_s - state.since_s >= plan.time_limit_s:
        return _to(plan, state, "failed", f"{plan.canary} was not ready within {plan.time_limit_s:g} s", now_s)
    if not known.ready:
        return state, ()
    state = replace(state, started_at_s=now_s)
    return _enter(plan, state, SHADOWING if plan.shadow else 0, now_s)


def _watch(plan: Plan, state: State, known: Known, now_s: float) -> Move:
    verdict = known.verdict
    if verdict and verdict.result == "fail":
        return _to(plan, state, "rolling_back", verdict.sentence, now_s)
    if known.load_error:
        return _to(plan, state, "rolling_back", f"{plan.canary} cannot be loaded again: {known.load_error}", now_s)
    if state.phase == "awaiting_approval" or state.paused:
        return state, ()
    if _step_is_done(plan, state, known, now_s):
        return _leave_step(plan, state, now_s)
    return _wait(plan, state, known, now_s)


def _step_is_done(plan: Plan, state: State, known: Known, now_s: float) -> bool:
    step = _step(plan, state)
    if known.verdict is None or known.n_step < step.min_samples or now_s - state.step_since_s < step.hold_s:
        return False
    last = state.step == len(plan.steps) - 1
    return known.verdict.result == "pass" or not (last or _wants_proof(step))


def _leave_step(plan: Plan, state: State, now_s: float) -> Move:
    step = _step(plan, state)
    if isinstance(step, Step) and step.gate == "approval" and state.approved_step != state.step:
        return _to(plan, state, "awaiting_approval", f"step {state.step + 1} is done: approve to go on", now_s)
    return _next_step(plan, state, now_s)


def _next_step(plan: Plan, state: State, now_s: float) -> Move:
    if state.step + 1 < len(plan.steps):
        return _enter(plan, state, state.step + 1, now_s)
    return _to(plan, state, "promoting", f"{plan.canary} is within every margin", now_s)


def _wait(plan: Plan, state: State, known: Known, now_s: float) -> Move:
    """Not decided yet: patience, then what the plan says about silence."""
    why = known.verdict.sentence if known.verdict else "no evidence yet"
    if now_s - state.started_at_s >= plan.time_limit_s:
        why = f"time limit of {plan.time_limit_s:g} s reached; {why}"
    elif now_s - state.step_since_s < plan.patience_s:
        return state, ()
    if plan.on_inconclusive == "rollback":
        return _to(plan, state, "rolling_back", why, now_s)
    return (state, ()) if state.phase == "holding" else _hold(plan, state, why, now_s)


def _approve(plan: Plan, state: State, now_s: float, by: str) -> Move:
    """`promote` opens the gate of this step. It never skips what the guards still have to prove."""
    if state.phase != "awaiting_approval":
        raise InvalidRequest(f"nothing waits for approval: the rollout is {state.phase}", param="command")
    return _next_step(plan, replace(state, approved_step=state.step, reason=f"approved by {by}"), now_s)


def _hold(plan: Plan, state: State, reason: str, now_s: float) -> Move:
    return _to(plan, state, "holding", reason, now_s)


def _resume(plan: Plan, state: State, reason: str, now_s: float) -> Move:
    return _to(plan, state, "shadowing" if state.step == SHADOWING else "progressing", reason, now_s)


def _enter(plan: Plan, state: State, step: int, now_s: float) -> Move:
    state = replace(state, step=step, step_since_s=now_s)
    if step == SHADOWING:
        return _to(plan, state, "shadowing", "mirroring requests to the canary", now_s)
    weight = plan.steps[step].weight
    reason = f"step {step + 1} of {len(plan.steps)}: {weight:g} % to {plan.canary}"
    return _to(plan, state, "progressing", reason, now_s)


def _to(plan: Plan, state: State, phase: Phase, reason: str, now_s: float, then: tuple[Action, ...] = ()) -> Move:
    state = replace(state, phase=phase, reason=reason, since_s=now_s)
    return state, (*actions_of(plan, state), *then)


def actions_of(plan: Plan, state: State) -> tuple[Action, ...]:
    """What must be true in this state; a controller that starts anew applies it again."""
    if state.phase in ("pending", "failed"):
        return ()
    if state.phase in ("promoting", "succeeded"):
        return (Action("promote"),)
    shadowing = state.phase in _WATCHED and state.step == SHADOWING and plan.shadow is not None
    rate = plan.shadow.rate if shadowing and plan.shadow else 0.0
    return (Action("traffic", canary_weight(plan, state), rate),)


def _step(plan: Plan, state: State) -> Step | Shadow:
    if state.step >= 0:
        return plan.steps[state.step]
    return plan.shadow or Shadow()


def _wants_proof(step: Step | Shadow) -> bool:
    return isinstance(step, Step) and step.evidence == "pass"
