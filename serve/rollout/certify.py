"""Would this plan judge rightly on *your* traffic? Recorded outcomes are dealt out again and judged.

What stable served is dealt to two arms that do not differ, by a new salt each time, as a sticky split would deal the
same users: an A/A test. Any rollback is a false one; their share must not exceed alpha. Then effects are planted on one
arm, in the same records: failures, slower tokens, drift. The share that is rolled back is the power, and the median
number of requests that it took is the sample that you need.

One thing a replay cannot show: both arms were served by the same replicas, so what lingers on one server (a noisy
neighbour, a hang) touches both alike. The simulation in the tests has two servers for that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Final

from serve.rollout.evidence import Evidence, Rules, StepSeen
from serve.rollout.judge import Verdict, judge
from serve.rollout.outcome import Batch, Outcome
from serve.rollout.plan import Plan
from serve.rollout.split import Split, assign

__all__ = ["EFFECTS", "Certificate", "Effect", "Row", "certify"]

Plant = Callable[[Outcome, random.Random], Outcome]

_PARCEL: Final = 50


@dataclass(frozen=True)
class Effect:
    """A difference to plant on one arm, and whether it ought to be rolled back."""

    name: str
    plant: Plant
    harmful: bool


@dataclass(frozen=True)
class Row:
    """One effect over all replays. `median_requests`: of the canary, when it was rolled back or passed."""

    effect: str
    harmful: bool
    replays: int
    rolled_back: float
    passed: float
    median_requests: int | None


@dataclass(frozen=True)
class Certificate:
    """`false_rollback` with no effect at all, `power` over the harmful ones; over `outcomes` recorded requests."""

    outcomes: int
    users: int
    alpha: float
    false_rollback: float
    power: Mapping[str, float]
    rows: tuple[Row, ...]
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _nothing(outcome: Outcome, _: random.Random) -> Outcome:
    return outcome


def slower(factor: float) -> Plant:
    """All latencies of the canary times `factor`."""

    def plant(outcome: Outcome, _: random.Random) -> Outcome:
        times = {
            name: value * factor
            for name in ("ttft_s", "itl_mean_s", "itl_max_s", "e2e_s")
            if (value := getattr(outcome, name)) is not None
        }
        return replace(outcome, **times)

    return plant


def failing(added: float) -> Plant:
    """A share `added` of the canary's requests fails that did not."""

    def plant(outcome: Outcome, rng: random.Random) -> Outcome:
        return replace(outcome, error="planted") if rng.random() < added else outcome

    return plant


EFFECTS: Final = (
    Effect("none", _nothing, harmful=False),
    Effect("2 % slower", slower(1.02), harmful=False),
    Effect("20 % slower", slower(1.20), harmful=True),
    Effect("1 % more errors", failing(0.01), harmful=True),
    Effect("5 % more errors", failing(0.05), harmful=True),
)


def certify(
    plan: Plan,
    recorded: Sequence[Outcome],
    *,
    replays: int = 100,
    seed: int = 0,
    effects: Sequence[Effect] = EFFECTS,
    looks_every: int = _PARCEL,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Certificate:
    """Replay the recorded outcomes of `plan.stable`; `progress(done, total)` is called after every replay."""
    kept = sorted((o for o in recorded if _usable(o, plan)), key=lambda outcome: outcome.assigned_at_s)
    rows = []
    for index, effect in enumerate(effects):
        ends = []
        for replay in range(replays):
            ends.append(_replay(plan, kept, effect, f"{seed} {effect.name} {replay}", looks_every))
            progress(index * replays + replay + 1, len(effects) * replays)
        rows.append(_row(effect, ends))
    return _certificate(plan, kept, rows)


def _usable(outcome: Outcome, plan: Plan) -> bool:
    return outcome.variant == plan.stable and not outcome.is_open and not outcome.shadow and outcome.route != "pinned"


def _replay(plan: Plan, recorded: Sequence[Outcome], effect: Effect, salt: str, looks_every: int) -> tuple[str, int]:
    """("fail", "pass" or "inconclusive", canary requests by then): at the first look that decides."""
    rng = random.Random(salt)  # noqa: S311  a replay that can be repeated, not a secret
    split = Split(plan.stable, {plan.stable: 50.0, plan.canary: 50.0}, plan.canary, salt=salt)
    evidence = Evidence(Rules(plan.stable, plan.canary, plan.deadline_s, 0.0, plan.block_s))
    evidence.begin_step(StepSeen(0, 50.0, 0, 0.0))
    verdict: Verdict | None = None
    for parcel in _parcels(_dealt(recorded, split, effect, rng), looks_every):
        evidence.take(parcel)
        verdict = judge(plan, evidence)
        if verdict.result in ("fail", "pass"):
            break
    return (verdict.result, verdict.n_canary) if verdict else ("no_data", 0)


def _dealt(recorded: Sequence[Outcome], split: Split, effect: Effect, rng: random.Random) -> Iterator[Outcome]:
    for record, outcome in enumerate(recorded, start=1):
        assignment = assign(split, outcome.unit, str(record))
        dealt = replace(
            outcome, record=record, variant=assignment.variant, route=assignment.route, revision=0, held_out=False
        )
        yield effect.plant(dealt, rng) if dealt.variant == split.canary else dealt


def _parcels(outcomes: Iterator[Outcome], size: int) -> Iterator[Batch]:
    sequence, held = 1, []
    for outcome in outcomes:
        held.append(outcome)
        if len(held) == size:
            yield Batch("replay", sequence, outcome.assigned_at_s, tuple(held))
            sequence, held = sequence + 1, []
    if held:
        yield Batch("replay", sequence, held[-1].assigned_at_s, tuple(held))


def _row(effect: Effect, ends: Sequence[tuple[str, int]]) -> Row:
    decided = [n for result, n in ends if result == ("fail" if effect.harmful else "pass")]
    return Row(
        effect=effect.name,
        harmful=effect.harmful,
        replays=len(ends),
        rolled_back=sum(result == "fail" for result, _ in ends) / len(ends),
        passed=sum(result == "pass" for result, _ in ends) / len(ends),
        median_requests=int(median(decided)) if decided else None,
    )


def _certificate(plan: Plan, recorded: Sequence[Outcome], rows: Sequence[Row]) -> Certificate:
    false = max((row.rolled_back for row in rows if row.effect == "none"), default=0.0)
    power = {row.effect: row.rolled_back for row in rows if row.harmful}
    users = len({outcome.unit for outcome in recorded if outcome.unit is not None})
    worst = min(power, key=lambda name: power[name]) if power else None
    least = f"; the hardest harm to find, {worst}, in {100 * power[worst]:.0f} %" if worst else ""
    sentence = (
        f"on {len(recorded)} recorded requests of {users} users the plan rolls back falsely in {100 * false:.1f} % "
        f"(alpha {100 * plan.alpha:g} %){least}"
    )
    return Certificate(len(recorded), users, plan.alpha, false, power, tuple(rows), sentence)
