"""Bookkeeping that keeps evidence honest: what was counted before, what is open, what is only more of the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from serve.rollout.outcome import Outcome

__all__ = ["Bursts", "Sender"]

_PARCELS: Final = 256  # parcels of one ingress that may still be recognised as repeated
_REMEMBERED: Final = 20_000  # finished records beyond a gap


@dataclass
class Sender:
    """One ingress. Its records are numbered on; all up to `done_below` are dealt with, and those in `done`.

    `unscored`: those that counted without drift, which may follow later under the same number.
    """

    parcels: list[int] = field(default_factory=list)
    done_below: int = 0
    done: set[int] = field(default_factory=set)
    open: dict[int, Outcome] = field(default_factory=dict)
    overdue: set[int] = field(default_factory=set)
    partners: dict[int, Outcome] = field(default_factory=dict)
    unscored: dict[int, None] = field(default_factory=dict)

    def is_new_parcel(self, sequence: int) -> bool:
        if sequence in self.parcels or (self.parcels and sequence < self.parcels[0]):
            return False
        self.parcels = sorted([*self.parcels, sequence])[-_PARCELS:]
        return True

    def meet(self, outcomes: Iterable[Outcome]) -> None:
        """Records from before the first parcel are none of this rollout's."""
        if not self.done_below:
            self.done_below = min((outcome.record for outcome in outcomes), default=1) - 1

    def is_done(self, record: int) -> bool:
        return record <= self.done_below or record in self.done

    def finish(self, record: int) -> None:
        self.open.pop(record, None)
        self.overdue.discard(record)
        self.done.add(record)
        if len(self.done) > _REMEMBERED:  # records that were lost left a gap: give it up
            self.done_below = min(self.done) - 1
        while self.done_below + 1 in self.done:
            self.done_below += 1
            self.done.discard(self.done_below)

    def to_dict(self) -> dict[str, Any]:
        return {
            "parcels": self.parcels,
            "done_below": self.done_below,
            "done": sorted(self.done),
            "open": [outcome.to_dict() for outcome in self.open.values()],
            "overdue": sorted(self.overdue),
            "unscored": list(self.unscored),
            "partners": [[key, outcome.to_dict()] for key, outcome in self.partners.items()],
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Sender:
        opened = [Outcome.from_dict(outcome) for outcome in mapping["open"]]
        return cls(
            parcels=list(mapping["parcels"]),
            done_below=mapping["done_below"],
            done=set(mapping["done"]),
            open={outcome.record: outcome for outcome in opened},
            overdue=set(mapping["overdue"]),
            unscored=dict.fromkeys(mapping["unscored"]),
            partners={key: Outcome.from_dict(outcome) for key, outcome in mapping["partners"]},
        )


@dataclass
class Bursts:
    """Admits the failures that are news: per block and arm three, or thrice the usual. Arms: 0 stable, 1 canary."""

    block: int | None = None
    here: list[int] = field(default_factory=lambda: [0, 0])
    closed: int = 0
    blocks: int = 1

    def admits(self, failed: bool, arm: int, block: int, share: float) -> bool:
        """Whether this request adds a failure; every request is told, so that quiet blocks are known too."""
        if self.block is None or block > self.block:
            self.closed, self.here = self.closed + sum(self.here), [0, 0]
            self.block, self.blocks = block, self.blocks + 1
        usual = self.closed / self.blocks * share
        news = failed and self.here[arm] < 3.0 + 3.0 * usual
        self.here[arm] += news
        return news
