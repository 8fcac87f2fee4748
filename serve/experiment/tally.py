"""What an experiment has seen: parcels of outcomes go in, sums come out. No clock and no opinion.

What counts: a request that the experiment's split dealt to one of its arms. What is left out is counted by reason:
pinned, held out, the client's own fault, warm-up, mirrored, and dealt earlier. Each record counts once, however often
it comes; its drift may follow later under its number. What the reference served and another arm read is that arm's
drift, and stands beside that of its own answers. A request still open past the deadline has failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import log
from typing import Any, Final

from serve.experiment.arm import Arm
from serve.experiment.clusters import MOST_BLOCKS, USER_GROUPS, Place
from serve.experiment.plan import Plan
from serve.rollout.ledger import Sender
from serve.rollout.measures import MEASURES, Measure
from serve.rollout.outcome import Batch, Outcome
from serve.rollout.sums import Sums

__all__ = ["COMPARED", "HELD_OUT", "Tally"]

HELD_OUT: Final = "held out"
_REMEMBERED_UNITS: Final = 20_000
_REASONS: Final = ("pinned", "held_out", "client_fault", "warm_up", "shadow", "earlier")
_LATE: Final = 4096  # records that may still get their drift, per ingress


def _log_tpot(outcome: Outcome) -> float | None:
    return log(outcome.tpot_s) if outcome.ok and outcome.tpot_s else None


COMPARED: Final[Mapping[str, Measure]] = {
    "ttft": MEASURES["ttft"],
    "itl": MEASURES["itl"],
    "tpot": replace(MEASURES["itl"], name="tpot", label="TPOT", value=_log_tpot),
    "e2e": MEASURES["e2e"],
    "output_length": MEASURES["output_length"],
}
"""What arms are compared by, at equal load, exactly as a rollout does it."""


@dataclass
class Tally:
    """`revision`: of the split that deals the experiment; `until`: of the one after it, once it has ended."""

    plan: Plan
    revision: int
    since_s: float
    until: int | None = None
    width_s: float = 30.0
    arms: dict[str, Arm] = field(default_factory=dict)
    contrasts: dict[str, dict[str, Sums]] = field(default_factory=dict)  # variant -> measure -> sums
    units: dict[int, None] = field(default_factory=dict)
    assigned: dict[str, int] = field(default_factory=dict)  # arm -> units, the held out among them
    anonymous: int = 0
    left_out: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_REASONS, 0))
    lost: dict[str, int] = field(default_factory=dict)  # ingress and variant -> records dropped there
    senders: dict[str, Sender] = field(default_factory=dict)

    @classmethod
    def begin(cls, plan: Plan, revision: int, since_s: float) -> Tally:
        arms = {name: Arm() for name in plan.arms}
        contrasts = {name: {measure: Sums() for measure in COMPARED} for name in plan.arms[1:]}
        assigned = dict.fromkeys([*plan.arms, HELD_OUT], 0)
        return cls(plan, revision, since_s, width_s=plan.block_s, arms=arms, contrasts=contrasts, assigned=assigned)

    @property
    def blocks(self) -> int:
        """Blocks of time in which anything was counted."""
        return len({block for arm in self.arms.values() for block in arm.errors.blocks})

    def take(self, parcel: Batch) -> bool:
        """Count a parcel; False if it was counted before."""
        sender = self.senders.setdefault(parcel.ingress, Sender())
        if not sender.is_new_parcel(parcel.sequence):
            return False
        for variant, count in (parcel.lost or {}).items():
            self.lost[f"{parcel.ingress} {variant}"] = count
        sender.meet(parcel.outcomes)
        for outcome in parcel.outcomes:
            self._take(sender, outcome)
        self._expire(sender, parcel.sent_at_s)
        return True

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and complete: `from_dict` goes on exactly where this stands."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "plan": self.plan.to_dict(),
            "units": list(self.units),
            "arms": {name: arm.to_dict() for name, arm in self.arms.items()},
            "contrasts": {
                name: {measure: sums.to_dict() for measure, sums in by.items()} for name, by in self.contrasts.items()
            },
            "senders": {name: sender.to_dict() for name, sender in self.senders.items()},
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Tally:
        return cls(
            **{name: mapping[name] for name in _PLAIN},
            plan=Plan.from_dict(mapping["plan"]),
            units=dict.fromkeys(mapping["units"]),
            arms={name: Arm.from_dict(arm) for name, arm in mapping["arms"].items()},
            contrasts={
                name: {measure: Sums(**sums) for measure, sums in by.items()}
                for name, by in mapping["contrasts"].items()
            },
            senders={name: Sender.from_dict(sender) for name, sender in mapping["senders"].items()},
        )

    def _take(self, sender: Sender, outcome: Outcome) -> None:
        record = outcome.record
        if sender.is_done(record):
            if record in sender.unscored and self._score(outcome, self._place(outcome)):
                del sender.unscored[record]
            return
        counts = self._counts(outcome)
        if self._is_dealt_here(outcome) and outcome.route != "pinned" and not outcome.shadow:
            self._meet(sender, outcome)
        if outcome.is_open:
            sender.open[record] = outcome
            return
        sender.finish(record)
        if counts is None:
            self._count(sender, outcome)
        else:
            self.left_out[counts] += 1

    def _counts(self, outcome: Outcome) -> str | None:
        """Why it does not count; None if it does."""
        if outcome.shadow:
            return "shadow"
        if not self._is_dealt_here(outcome):
            return "earlier"
        if outcome.route == "pinned":
            return "pinned"
        if outcome.variant not in self.arms:
            return "earlier"
        if outcome.held_out:
            return "held_out"
        if outcome.client_fault:
            return "client_fault"
        return "warm_up" if outcome.warm_up else None

    def _is_dealt_here(self, outcome: Outcome) -> bool:
        return self.revision <= outcome.revision < (self.until or outcome.revision + 1)

    def _meet(self, sender: Sender, outcome: Outcome) -> None:
        """Units by arm, each at first sight: their split must be the configured one."""
        if outcome.record in sender.open:
            return
        arm = HELD_OUT if outcome.held_out else outcome.variant
        if outcome.unit is None:
            self.anonymous += 1
        else:
            unit = int(outcome.unit[:12], 16)
            if unit in self.units or len(self.units) >= _REMEMBERED_UNITS:
                return
            self.units[unit] = None
        self.assigned[arm] = self.assigned.get(arm, 0) + 1

    def _count(self, sender: Sender, outcome: Outcome) -> None:
        place = self._place(outcome)
        settled = outcome.assigned_at_s - self.since_s >= self.plan.settle_s
        arm = self.arms[outcome.variant]
        arm.count(outcome, place, settled=settled)
        if not self._score(outcome, place):
            sender.unscored[outcome.record] = None
            while len(sender.unscored) > _LATE:
                sender.unscored.pop(next(iter(sender.unscored)))
        if settled:
            self._compare(outcome)

    def _score(self, outcome: Outcome, place: Place) -> bool:
        """Add what the answer says of an arm's drift; False if it says nothing (yet)."""
        found = [(arm, drift) for name, arm in self.arms.items() if (drift := outcome.drift_of(name))]
        for arm, drift in found:
            arm.score(drift, place)
        return bool(found)

    def _compare(self, outcome: Outcome) -> None:
        """A baseline's request is compared with every other arm, another's with the baseline's alone."""
        baseline = self.plan.baseline
        for name in self.contrasts if outcome.variant == baseline else (outcome.variant,):
            share = self.plan.weights[name] / (self.plan.weights[name] + self.plan.weights[baseline])
            for measure, sums in self.contrasts[name].items():
                how = COMPARED[measure]
                if (value := how.value(outcome)) is not None:
                    sums.add_contrast(
                        value, canary=outcome.variant == name, weight_ratio=share, stratum=how.stratum(outcome),
                        unit=None if outcome.unit is None else int(outcome.unit, 16), step=0,
                        block=int(outcome.assigned_at_s // self.plan.block_s), discount=how.discount,
                        load=how.load(outcome),
                    )  # fmt: skip

    def _place(self, outcome: Outcome) -> Place:
        """The group of its user (a request without one is its own user) and its block of time."""
        unit = outcome.record if outcome.unit is None else int(outcome.unit, 16)
        since_s = max(0.0, outcome.assigned_at_s - self.since_s)
        while since_s >= MOST_BLOCKS * self.width_s:
            self.width_s *= 2.0
            for arm in self.arms.values():
                arm.join_blocks()
        return unit % USER_GROUPS, int(since_s // self.width_s)

    def _expire(self, sender: Sender, sent_at_s: float) -> None:
        """Open past the deadline, and found so twice: a clock that jumps makes no failures."""
        for record, outcome in list(sender.open.items()):
            if sent_at_s - outcome.assigned_at_s < self.plan.deadline_s:
                continue
            if record not in sender.overdue:
                sender.overdue.add(record)
                continue
            sender.finish(record)
            if self._counts(outcome) is None:
                self._count(sender, replace(outcome, finished_at_s=sent_at_s, error="deadline"))


_PLAIN: Final = ("revision", "since_s", "until", "width_s", "assigned", "anonymous", "left_out", "lost")
