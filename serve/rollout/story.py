"""What happened and why, told from the journal alone: pure functions from rows to facts and a sentence.

The terminal, JSON and the dashboard tell the same story, since they all ask here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from serve.rollout.judge import Finding, Verdict
from serve.rollout.machine import State

__all__ = ["Chapter", "Line", "Story", "explain", "history", "overview", "summary"]


class Row(Protocol):
    """A row of the journal, from whatever store."""

    @property
    def rollout(self) -> str: ...
    @property
    def at_s(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def sentence(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Line:
    """One thing that happened. `after_s`: seconds since the rollout began; `weight`: the canary's, from then on."""

    at_s: float
    after_s: float
    kind: str
    sentence: str
    phase: str | None = None
    weight: float | None = None
    e_value: float | None = None
    n_canary: int | None = None
    n_stable: int | None = None


@dataclass(frozen=True)
class Chapter:
    """One guard's last word before the end."""

    guard: str
    result: str
    sentence: str


@dataclass(frozen=True)
class Story:
    """One rollout, explained. `decisive`: the guard that ended it, if one did."""

    rollout: str
    stable: str
    canary: str
    phase: str
    weight: float
    started_at_s: float
    lasted_s: float
    decisive: str | None
    sentence: str
    chapters: tuple[Chapter, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def history(rows: Iterable[Row]) -> list[Line]:
    """Every row of one rollout as a line, in order."""
    lines: list[Line] = []
    began_s: float | None = None
    for row in rows:
        began_s = row.at_s if began_s is None else began_s
        verdict = row.facts if row.kind == "verdict" else row.facts.get("verdict") or {}
        lines.append(
            Line(
                at_s=row.at_s,
                after_s=row.at_s - began_s,
                kind=row.kind,
                sentence=row.sentence,
                phase=row.facts.get("to"),
                weight=row.facts.get("weight"),
                e_value=verdict.get("e_value"),
                n_canary=verdict.get("n_canary"),
                n_stable=verdict.get("n_stable"),
            )
        )
    return lines


def explain(rows: Sequence[Row], live: Verdict | None = None) -> Story:
    """Why one rollout stands where it stands. The rows are all of that rollout, oldest first, and not empty.

    live: the verdict of a rollout that runs, as it is now; the journal has it only when it changes.
    """
    first, last = rows[0], rows[-1]
    plan = first.facts["plan"]
    moves = [row for row in rows if row.kind == "transition"]
    phase = str(moves[-1].facts["to"]) if moves else "pending"
    weight = float(moves[-1].facts["weight"]) if moves else 0.0
    reason = moves[-1].sentence if moves else first.sentence
    verdict = live or _last_verdict(rows)
    ended = phase in ("rolling_back", "rolled_back", "succeeded")
    return Story(
        rollout=first.rollout,
        stable=plan["stable"],
        canary=plan["canary"],
        phase=phase,
        weight=weight,
        started_at_s=first.at_s,
        lasted_s=last.at_s - first.at_s,
        decisive=verdict.guard if verdict and ended else None,
        sentence=_sentence(plan, phase, weight, reason, verdict, last.at_s - first.at_s),
        chapters=tuple(_chapter(finding) for finding in (verdict.findings if verdict else ())),
    )


def overview(rows: Iterable[Row], now_s: float) -> list[dict[str, Any]]:
    """The summaries of all rollouts of a journal, the newest first."""
    by_rollout: dict[str, list[Row]] = {}
    for row in rows:
        by_rollout.setdefault(row.rollout, []).append(row)
    return [summary(own, now_s) for own in reversed(by_rollout.values())]


def summary(rows: Sequence[Row], now_s: float, live: Verdict | None = None) -> dict[str, Any]:
    """One rollout in a line of a table, JSON-ready (ROLLOUT in docs/ROLLOUTS.md). live: as in `explain`."""
    story, plan = explain(rows, live), rows[0].facts["plan"]
    moves = [row for row in rows if row.kind == "transition"]
    state = State.from_dict(moves[-1].facts["state"]) if moves else State()
    split = moves[-1].facts["split"] if moves else rows[0].facts["base"]
    return {
        "id": story.rollout,
        "stable": story.stable,
        "canary": story.canary,
        "phase": story.phase,
        "step": state.step,
        "steps": len(plan["steps"]),
        "weight": split["weights"].get(story.canary, 0.0),
        "shadow_rate": split["shadow"].get(story.canary, 0.0),
        "ended": state.ended,
        "paused": state.paused,
        "started_at_s": story.started_at_s,
        "lasted_s": story.lasted_s if state.ended else max(0.0, now_s - story.started_at_s),
        "decisive": story.decisive,
        "sentence": story.sentence,
    }


def _last_verdict(rows: Sequence[Row]) -> Verdict | None:
    for row in reversed(rows):
        facts = row.facts if row.kind == "verdict" else row.facts.get("verdict")
        if facts:
            return Verdict.from_dict(facts)
    return None


def _chapter(finding: Finding) -> Chapter:
    return Chapter(finding.guard, finding.result, finding.sentence)


def _sentence(
    plan: Mapping[str, Any], phase: str, weight: float, reason: str, verdict: Verdict | None, lasted_s: float
) -> str:
    canary, stable = plan["canary"], plan["stable"]
    seen = f" {verdict.n_canary} requests of {canary} and {verdict.n_stable} of {stable} were seen." if verdict else ""
    said = {
        "succeeded": f"{canary} replaced {stable} after {lasted_s:.0f} s: {reason}.",
        "rolled_back": f"{canary} was rolled back to {stable} after {lasted_s:.0f} s: {reason}.",
        "failed": f"The rollout to {canary} failed before it took traffic: {reason}.",
        "aborted": f"The rollout to {canary} was ended by hand: {reason}.",
        "pending": f"The rollout to {canary} has not begun: {reason}.",
    }.get(phase, f"The rollout to {canary} is {phase.replace('_', ' ')} at {weight:g} %: {reason}.")
    return said + seen
