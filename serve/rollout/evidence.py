"""What has been seen of one rollout: parcels of outcomes go in, running sums come out. No clock, no opinion.

What counts, by rule:
* a request under a split of this rollout, in the step it was *assigned* in; earlier ones belong to no step;
* never a pinned, held-out or client-fault request, and none that warmed a replica up;
* latency only after a step has settled (`settle_s`), for replicas fill their batches anew after each change of weight;
* an open request that its ingress still reports open past the deadline is a failure there and then, and stays one. It
  has to be reported twice, so that a clock that jumps makes no failures. If the ingress itself falls silent, its open
  requests say nothing about the variant;
* a burst of failures, one hang for instance, is one event: per block of time and arm, failures beyond three, or beyond
  three times more than usual, are not added to the count;
* a request counts once, however often its record arrives;
* the canary's quality is what its own answers drift, and how it reads an answer that stable served. A perplexity ratio
  looks only at tokens where it is fair: `Drift.nll_ratio_tokens` are prompts, and of stable's answers also the text.

The state is bounded and plain: `to_dict` after the same parcels in the same order is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from serve.rollout.ledger import Bursts, Sender
from serve.rollout.measures import LATENCIES, MEASURES, Measure
from serve.rollout.outcome import Batch, Outcome
from serve.rollout.sums import Sums

__all__ = ["Evidence", "Rules", "StepSeen"]

HARD_ERRORS: Final = ("replica_died", "nan", "oom")
_REMEMBERED: Final = 20_000  # units in the sample-ratio test: more would not change its answer
_PARTNERS: Final = 4096  # requests that wait for their mirror image, per ingress
_LATE: Final = 8192  # records that may still get their drift, per ingress


@dataclass(frozen=True)
class Rules:
    """What must be known to read an outcome; as in `Plan`."""

    stable: str
    canary: str
    deadline_s: float = 120.0
    settle_s: float = 30.0
    block_s: float = 30.0


@dataclass(frozen=True)
class StepSeen:
    """A step that traffic ran under: the canary's weight (0-100), from which split revision and time on."""

    index: int
    weight: float
    revision: int
    since_s: float


@dataclass
class Evidence:
    """Everything that the judge may look at. Grows by `begin_step` and `take`; the rest reads."""

    rules: Rules
    steps: list[StepSeen] = field(default_factory=list)
    sums: dict[str, Sums] = field(
        default_factory=lambda: {name: Sums(m.kind != "rate") for name, m in MEASURES.items()}
    )
    paired: dict[str, Sums] = field(default_factory=lambda: {name: Sums() for name in LATENCIES})
    # measure -> step -> [canary failures, stable failures, canary requests, stable requests], weighted
    tables: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    bursts: dict[str, Bursts] = field(default_factory=dict)
    assigned: dict[str, list[int]] = field(default_factory=dict)  # step -> [units on canary, units on stable]
    seen_units: dict[str, None] = field(default_factory=dict)
    hard: dict[str, int] = field(default_factory=dict)  # kind of hard failure of the canary -> seconds that had one
    hard_second: dict[str, int] = field(default_factory=dict)
    nonfinite_tokens: int = 0
    failures_in_a_row: int = 0
    finished_in_step: dict[str, list[int]] = field(default_factory=dict)  # step -> [canary, stable]
    lost: dict[str, int] = field(default_factory=dict)  # ingress and variant -> records dropped there
    senders: dict[str, Sender] = field(default_factory=dict)

    def begin_step(self, step: StepSeen) -> None:
        self.steps.append(step)

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

    def incident(self, kind: str, at_s: float) -> None:
        """A hard failure of the canary that no request saw: a replica that died idle, ran out of memory ..."""
        second = int(at_s)
        if self.hard_second.get(kind) != second:
            self.hard_second[kind] = second
            self.hard[kind] = self.hard.get(kind, 0) + 1

    def n(self, step: int | None = None) -> tuple[int, int]:
        """Finished requests that counted (canary, stable), in one step or in all."""
        rows = [row for key, row in self.finished_in_step.items() if step is None or key == str(step)]
        return sum(row[0] for row in rows), sum(row[1] for row in rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and complete: `from_dict` goes on exactly where this stands."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {
            **plain,
            "rules": asdict(self.rules),
            "steps": [asdict(step) for step in self.steps],
            "sums": {name: sums.to_dict() for name, sums in self.sums.items()},
            "paired": {name: sums.to_dict() for name, sums in self.paired.items()},
            "bursts": {name: asdict(bursts) for name, bursts in self.bursts.items()},
            "senders": {name: sender.to_dict() for name, sender in self.senders.items()},
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Evidence:
        return cls(
            **{name: mapping[name] for name in _PLAIN},
            rules=Rules(**mapping["rules"]),
            steps=[StepSeen(**step) for step in mapping["steps"]],
            sums={name: Sums(**sums) for name, sums in mapping["sums"].items()},
            paired={name: Sums(**sums) for name, sums in mapping["paired"].items()},
            bursts={name: Bursts(**bursts) for name, bursts in mapping["bursts"].items()},
            senders={name: Sender.from_dict(sender) for name, sender in mapping["senders"].items()},
        )

    def _take(self, sender: Sender, outcome: Outcome) -> None:
        step, record = self._step_of(outcome), outcome.record
        if sender.is_done(record):
            self._score_late(sender, outcome, step)
            return
        if step and record not in sender.open and not outcome.shadow:
            self._count_assignment(outcome, step)
        if outcome.is_open:
            if step:
                sender.open[record] = outcome
            return
        sender.finish(record)
        if step:
            self._count(sender, outcome, step)

    def _score_late(self, sender: Sender, outcome: Outcome, step: StepSeen | None) -> None:
        """Drift is measured after the answer, and comes under the number of a record that has counted already."""
        if step and outcome.drift_of(self.rules.canary) and outcome.record in sender.unscored:
            del sender.unscored[outcome.record]
            self._score(outcome, step)

    def _score(self, outcome: Outcome, step: StepSeen) -> None:
        """The canary's quality: its drift from the reference, on its own answer or on one of stable's."""
        if drift := outcome.drift_of(self.rules.canary):
            self.nonfinite_tokens += drift.nonfinite_tokens
            self._measure(replace(outcome, drift=drift), step, levels=True)

    def _expire(self, sender: Sender, sent_at_s: float) -> None:
        for record, outcome in list(sender.open.items()):
            if sent_at_s - outcome.assigned_at_s < self.rules.deadline_s:
                continue
            if record not in sender.overdue:
                sender.overdue.add(record)
                continue
            sender.finish(record)
            late = replace(outcome, finished_at_s=sent_at_s, error="deadline")
            if step := self._step_of(outcome):
                self._count(sender, late, step)

    def _step_of(self, outcome: Outcome) -> StepSeen | None:
        """The step whose split dealt this request; None if it does not count at all."""
        if outcome.route == "pinned" or outcome.held_out or outcome.client_fault:
            return None
        if outcome.variant not in (self.rules.stable, self.rules.canary):
            return None
        return next((step for step in reversed(self.steps) if step.revision <= outcome.revision), None)

    def _count_assignment(self, outcome: Outcome, step: StepSeen) -> None:
        """Units by arm, each at first sight: their split must be the configured one."""
        if outcome.unit is not None:
            if outcome.unit in self.seen_units or len(self.seen_units) >= _REMEMBERED:
                return
            self.seen_units[outcome.unit] = None
        self.assigned.setdefault(str(step.index), [0, 0])[not self._on_canary(outcome)] += 1

    def _count(self, sender: Sender, outcome: Outcome, step: StepSeen) -> None:
        canary = self._on_canary(outcome)
        if canary:
            self._watch_hard_failures(outcome)
        if outcome.warm_up:
            return
        self.finished_in_step.setdefault(str(step.index), [0, 0])[not canary] += 1
        self._measure(outcome, step, levels=False)
        if outcome.drift_of(self.rules.canary):
            self._score(outcome, step)
        else:
            sender.unscored[outcome.record] = None
            _forget(sender.unscored, _LATE)
        self._pair(sender, outcome, step)

    def _measure(self, outcome: Outcome, step: StepSeen, *, levels: bool) -> None:
        settled = outcome.assigned_at_s - step.since_s >= self.rules.settle_s
        for measure in MEASURES.values():
            if (measure.kind == "level") != levels or (measure.name in LATENCIES and not settled):
                continue
            if (value := measure.value(outcome)) is not None:
                self._add(measure, value, outcome, step)

    def _add(self, measure: Measure, value: float, outcome: Outcome, step: StepSeen) -> None:
        canary = self._on_canary(outcome)
        unit = None if outcome.unit is None else int(outcome.unit, 16)
        block = int(outcome.assigned_at_s // self.rules.block_s)
        sums, share = self.sums[measure.name], step.weight / 100.0
        if measure.kind == "level":
            sums.add_level(value, unit=unit, step=step.index, block=block, discount=measure.discount)
            return
        if measure.kind == "rate":
            bursts = self.bursts.setdefault(measure.name, Bursts())
            value = float(bursts.admits(value > 0.0, int(canary), block, share if canary else 1.0 - share))
        weight = sums.add_contrast(
            value, canary=canary, weight_ratio=share, stratum=f"{step.index} {measure.stratum(outcome)}",
            unit=unit, step=step.index, block=block, discount=measure.discount, load=measure.load(outcome),
        )  # fmt: skip
        if measure.kind == "rate":
            table = self.tables.setdefault(measure.name, {}).setdefault(str(step.index), [0.0] * 4)
            table[not canary] += weight * value
            table[2 + (not canary)] += weight

    def _on_canary(self, outcome: Outcome) -> bool:
        return outcome.variant == self.rules.canary

    def _watch_hard_failures(self, outcome: Outcome) -> None:
        if outcome.error in HARD_ERRORS:
            self.incident(str(outcome.error), outcome.finished_at_s or outcome.assigned_at_s)
        self.failures_in_a_row = 0 if outcome.ok else self.failures_in_a_row + 1

    def _pair(self, sender: Sender, outcome: Outcome, step: StepSeen) -> None:
        """A mirrored request against the served one, where both ran at the same load."""
        key = outcome.pair if outcome.shadow else outcome.record
        if key is None or step.weight > 0.0 or not outcome.ok:
            return
        partner = sender.partners.pop(key, None)
        if partner is None or partner.shadow == outcome.shadow:
            sender.partners[key] = outcome
            _forget(sender.partners, _PARTNERS)
            return
        mirrored, served = (outcome, partner) if outcome.shadow else (partner, outcome)
        unit = None if served.unit is None else int(served.unit, 16)
        block = int(served.assigned_at_s // self.rules.block_s)
        for name, sums in self.paired.items():
            measure = MEASURES[name]
            one, other = measure.value(mirrored), measure.value(served)
            if one is not None and other is not None and measure.stratum(mirrored) == measure.stratum(served):
                sums.add_level(one - other, unit=unit, step=step.index, block=block, discount=measure.discount)


_PLAIN: Final = (
    "tables", "assigned", "seen_units", "hard", "hard_second", "nonfinite_tokens", "failures_in_a_row",
    "finished_in_step", "lost",
)  # fmt: skip


def _forget(records: dict[int, Any], limit: int) -> None:
    while len(records) > limit:
        records.pop(next(iter(records)))
