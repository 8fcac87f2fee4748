"""All experiments of one server: at most one is scheduled or running, and the ended ones can still be read.

What must outlive the controller goes through `Shelf`, two methods that a database fills. A whole experiment is put
there at every change of state, and while it runs every `_SAVE_S`; what was counted since is lost with a controller
that dies, and the requests that were then open are not taken for failures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from serve.errors import Conflict, NotFound
from serve.experiment.experiment import Experiment
from serve.experiment.plan import plan_for
from serve.experiment.report import Facts
from serve.rollout.outcome import Batch
from serve.rollout.split import Split

__all__ = ["Laboratory", "Shelf"]

_SAVE_S: Final = 10.0
_KEPT: Final = 100


class Shelf(Protocol):
    """JSON documents by name, in the order in which they first came."""

    def put(self, name: str, document: str) -> None: ...

    def documents(self) -> Sequence[Mapping[str, Any]]: ...


class Laboratory:
    """Every method that moves traffic returns the split to put in force; None leaves it as it is."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._all = {}
        for document in shelf.documents():
            experiment = Experiment.from_dict(document)
            self._all[experiment.plan.name] = experiment
            for sender in experiment.tally.senders.values() if experiment.tally else ():
                sender.open.clear()  # how they ended may have been told to a controller that is gone
        self._saved_at_s = 0.0

    @property
    def active(self) -> Experiment | None:
        return next((e for e in self._all.values() if e.state != "ended"), None)

    @property
    def split(self) -> Split | None:
        """The split of the running experiment: what a new controller must go on with."""
        return self.active.split if self.active else None

    def start(
        self,
        asked: Mapping[str, Any],
        in_force: Split,
        variants: Sequence[str],
        facts: Mapping[str, Facts],
        now_s: float,
    ) -> Split | None:
        """Raises ConfigError by the key, and Conflict while another one runs."""
        plan = plan_for(asked, in_force.stable, variants, now_s)
        if self.active:
            raise Conflict(f"experiment {self.active.plan.name!r} is {self.active.state}; stop it first")
        if plan.name in self._all:
            raise Conflict(f"an experiment {plan.name!r} has been before; give this one another name", param="name")
        self._all[plan.name] = Experiment(plan, created_at_s=now_s)
        split = self._begin_if_due(in_force, facts, now_s)
        self._save(self._all[plan.name], now_s)
        while len(self._all) > _KEPT:
            del self._all[next(iter(self._all))]
        return split

    def stop(self, name: str, in_force: Split, now_s: float) -> Split | None:
        """Raises NotFound; stopping one that has ended changes nothing."""
        experiment = self._find(name)
        return None if experiment.state == "ended" else self._end(experiment, in_force, "operator", now_s)

    def tick(self, in_force: Split, facts: Mapping[str, Facts], now_s: float) -> Split | None:
        """What time alone brings about; call it about once a second."""
        for experiment in self._all.values():
            if experiment.close(facts, now_s):
                self._save(experiment, now_s)
        active = self.active
        if active is None:
            return None
        if active.plan.ends_at_s is not None and now_s >= active.plan.ends_at_s:
            return self._end(active, in_force, "time", now_s)
        split = self._begin_if_due(in_force, facts, now_s)
        if split or now_s - self._saved_at_s >= _SAVE_S:
            self._save(active, now_s)
        return split

    def take(self, parcel: Batch) -> None:
        """A parcel of an ingress, for every experiment that still counts."""
        for experiment in self._all.values():
            experiment.take(parcel)

    def list(self) -> dict[str, Any]:
        return {
            "active": self.active.plan.name if self.active else None,
            "experiments": [experiment.describe() for experiment in reversed(self._all.values())],
        }

    def describe(self, name: str) -> dict[str, Any]:
        return self._find(name).describe()

    def report(self, name: str, facts: Mapping[str, Facts], now_s: float) -> dict[str, Any]:
        """Raises NotFound."""
        return self._find(name).report(facts, now_s)

    def _begin_if_due(self, in_force: Split, facts: Mapping[str, Facts], now_s: float) -> Split | None:
        active = self.active
        if active is None or active.state != "scheduled" or now_s < active.plan.starts_at_s:
            return None
        return active.start(in_force, facts, now_s)

    def _end(self, experiment: Experiment, in_force: Split, by: str, now_s: float) -> Split:
        split = experiment.stop(in_force, by, now_s)
        self._save(experiment, now_s)
        return split

    def _find(self, name: str) -> Experiment:
        if name not in self._all:
            raise NotFound(f"there is no experiment {name!r}; known: {', '.join(self._all) or 'none'}", param="name")
        return self._all[name]

    def _save(self, experiment: Experiment, now_s: float) -> None:
        self._saved_at_s = now_s
        self._shelf.put(experiment.plan.name, json.dumps(experiment.to_dict()))
