"""One experiment from its start to its last report. Pure: times, parcels and facts come in.

    scheduled --(its time has come)--> running --(its time is over, or an operator)--> ended

While it runs it owns the split; when it ends, traffic is again what it was before. Requests that were dealt before the
end still count for `deadline_s`; then the sums are dropped and the report is kept as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from serve.experiment.plan import Plan
from serve.experiment.report import Facts, report
from serve.experiment.tally import Tally
from serve.rollout.outcome import Batch
from serve.rollout.split import Split

__all__ = ["Experiment", "State"]

State = Literal["scheduled", "running", "ended"]

Meters = dict[str, tuple[float | None, float]]
"""Per variant, its joules (None: not measured) and its tokens, as counted since the server's start."""


@dataclass
class Experiment:
    """`base`: the split before it; `split`: the one it deals by. `final`: the report once nothing more can come."""

    plan: Plan
    created_at_s: float
    state: State = "scheduled"
    started_at_s: float | None = None
    stopped_at_s: float | None = None
    stopped_by: str | None = None
    base: Split | None = None
    split: Split | None = None
    tally: Tally | None = None
    meters: Meters = field(default_factory=dict)
    final: dict[str, Any] | None = None

    def start(self, base: Split, facts: Mapping[str, Facts], now_s: float) -> Split:
        """Deal by its weights from now on: the split to put in force."""
        self.state, self.started_at_s = "running", now_s
        self.base, self.split = base, self.plan.split(base)
        self.tally = Tally.begin(self.plan, self.split.revision, now_s)
        self.meters = {name: (s.energy_joules, s.generation_tokens) for name, s in facts.items()}
        return self.split

    def stop(self, in_force: Split, by: str, now_s: float) -> Split:
        """End it: the split to put in force, traffic as before and mirrors as they are now."""
        self.state, self.stopped_at_s, self.stopped_by = "ended", now_s, by
        if self.base is None or self.tally is None:
            return in_force
        back = replace(self.base, shadow=in_force.shadow, revision=in_force.revision + 1)
        self.tally.until = back.revision
        return back

    def take(self, parcel: Batch) -> bool:
        return self.tally is not None and self.tally.take(parcel)

    def close(self, facts: Mapping[str, Facts], now_s: float) -> bool:
        """Keep the last report and let the sums go, once the last request can have ended. True if that was now."""
        if self.tally is None or self.stopped_at_s is None or now_s < self.stopped_at_s + self.plan.deadline_s:
            return False
        self.final = self.report(facts, now_s)
        self.tally = None
        return True

    def report(self, facts: Mapping[str, Facts], now_s: float) -> dict[str, Any]:
        """As documented in docs/EXPERIMENTS.md."""
        if self.final is not None:
            return {**self.final, "experiment": self.describe()}
        tally = self.tally or Tally.begin(self.plan, 0, now_s)
        since = {name: self._since_start(name, fact) for name, fact in facts.items()}
        return {"experiment": self.describe(), **report(tally, since, self.stopped_at_s or now_s)}

    def describe(self) -> dict[str, Any]:
        """What it is and where it stands, without what it saw."""
        plan = self.plan.to_dict()
        shown = ("name", "baseline", "weights", "salt", "holdout", "price_per_hour", "settle_s", "block_s")
        return {
            "state": self.state,
            **{key: plan[key] for key in (*shown, "starts_at_s", "ends_at_s")},
            "created_at_s": self.created_at_s,
            "started_at_s": self.started_at_s,
            "stopped_at_s": self.stopped_at_s,
            "stopped_by": self.stopped_by,
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "plan": self.plan.to_dict(),
            "base": self.base.to_dict() if self.base else None,
            "split": self.split.to_dict() if self.split else None,
            "tally": self.tally.to_dict() if self.tally else None,
            "meters": {name: list(pair) for name, pair in self.meters.items()},
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Experiment:
        base, split, tally = mapping["base"], mapping["split"], mapping["tally"]
        return cls(
            **{name: mapping[name] for name in _PLAIN},
            plan=Plan.from_dict(mapping["plan"]),
            base=Split.from_dict(base) if base else None,
            split=Split.from_dict(split) if split else None,
            tally=Tally.from_dict(tally) if tally else None,
            meters={name: (pair[0], pair[1]) for name, pair in mapping["meters"].items()},
        )

    def _since_start(self, name: str, fact: Facts) -> Facts:
        joules, tokens = self.meters.get(name, (None, 0.0))
        measured = None if joules is None or fact.energy_joules is None else fact.energy_joules - joules
        return replace(fact, energy_joules=measured, generation_tokens=fact.generation_tokens - tokens)


_PLAIN = ("created_at_s", "state", "started_at_s", "stopped_at_s", "stopped_by", "final")
