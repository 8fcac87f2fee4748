"""The controller's office: the one rollout that runs, held under a lease and written down before it is acted upon.

    parcel -> store.keep -> Rollout.take -\\
    once a second, incident, order  -------+-> Rollout.tick -> store.commit -> Standing: what is to be true now

Everything here blocks and belongs to one thread (`serve.progression` owns it). A store that fails at any point costs
nothing but time: what is in memory is thrown away, and read again once the store answers, as after a crash. A parcel
that could not be written down is not counted, and its ingress sends it again.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from serve.errors import Conflict, InvalidRequest, NotFound, VariantUnavailable
from serve.heartbeat import VariantState
from serve.rollout import Batch, Entry, Outcome, Plan, Rollout, Split
from serve.rollout.machine import Command
from serve.rollout.store import Lease, LeaseLost, Record, Store, StoreUnavailable

__all__ = ["TRAFFIC", "News", "Office", "Scene", "Standing", "default_store"]

_LOG = logging.getLogger(__name__)
_LEASE_S: Final = 6.0
_CHECKPOINT_S: Final = 30.0
_SAME_DEATH_S: Final = 5.0
"""Incidents of one kind that come closer together are one: several witnesses tell of the same death."""
_RATE_S: Final = 60.0
TRAFFIC: Final = "traffic"
"""The subject in the store of what belongs to no rollout: recorded traffic, and splits set by hand."""


@dataclass(frozen=True)
class Scene:
    """What the rest of the server knows. applied_revision: the split that every ingress has in force, at least."""

    variants: Mapping[str, VariantState]
    applied_revision: int = -1

    def ready(self, name: str) -> bool:
        return name in self.variants and self.variants[name].state == "ready"

    def load_error(self, name: str) -> str | None:
        state = self.variants.get(name)
        return (state.reason or "no reason given") if state and state.state == "failed" else None


@dataclass(frozen=True)
class News:
    """One entry that is now in the journal, and of which rollout."""

    rollout: str
    stable: str
    canary: str
    entry: Entry


@dataclass(frozen=True)
class Standing:
    """What is to be true now. `split` is None while no rollout has anything to say about it.

    phase, canary: of the rollout that was begun last. active: it has not ended. freed: variants whose memory is given
    back. verdicts: how many of each result there were, by canary. news: what was written down since it was last told.
    """

    split: Split | None = None
    active: str | None = None
    phase: str | None = None
    canary: str | None = None
    freed: frozenset[str] = frozenset()
    verdicts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    news: tuple[News, ...] = ()


class Office:
    """holder: a name that is new at every start. configured: the split of the configuration; one that was edited since
    a rollout ended wins over what that rollout left behind. variants: the names that this server has."""

    def __init__(
        self,
        open_store: Callable[[], Store],
        holder: str,
        variants: Collection[str],
        configured: Split,
        recorded_parcels: int = 0,
    ) -> None:
        self._open_store = open_store
        self._holder = holder
        self._variants = frozenset(variants)
        self._configured = configured.to_dict()
        self._recorded_parcels = recorded_parcels
        self._opened: Store | None = None
        self._lease: Lease | None = None
        self._renewed_s = float("-inf")
        self._rollout: Rollout | None = None
        self._active_id: str | None = None
        self._split: Split | None = None
        self._freed: set[str] = set()
        self._verdicts: dict[tuple[str, str], int] = {}
        self._news: list[News] = []
        self._died_s: dict[str, float] = {}
        self._checkpoint_s = 0.0
        self._dirty = False
        self._recorded = 0
        self._seen: deque[tuple[float, int]] = deque()
        self._problem = "it has not been opened yet"

    # What runs

    def recall(self) -> Standing:
        """What was in force when the last controller stopped: read without a lease, acted upon only by dealing it."""
        try:
            self._remember()
        except StoreUnavailable as error:
            self._fall_back(error)
        return self.standing()

    def standing(self) -> Standing:
        """What holds now, with the news since the last call."""
        news, self._news = tuple(self._news), []
        rollout = self._rollout
        return Standing(
            split=self._split,
            active=self._active_id,
            phase=rollout.state.phase if rollout else None,
            canary=rollout.plan.canary if rollout else None,
            freed=frozenset(self._freed),
            verdicts=dict(self._verdicts),
            news=news,
        )

    def tick(self, scene: Scene, now_s: float) -> Standing:
        """Once a second: keep the lease, judge, move."""
        try:
            if self._hold(now_s):
                self._advance(scene, now_s)
        except StoreUnavailable as error:
            self._fall_back(error)
        return self.standing()

    def take(self, parcel: Batch, scene: Scene, now_s: float) -> tuple[bool, Standing]:
        """Write a parcel down, count it and see what follows. False: it was not written down, send it again."""
        self._seen.append((now_s, sum(not outcome.is_open for outcome in parcel.outcomes)))
        while now_s - self._seen[0][0] > _RATE_S:
            self._seen.popleft()
        try:
            if not self._hold(now_s):
                return False, self.standing()
            if (rollout := self._active()) is None:
                self._record(parcel)
                return True, self.standing()
            self._store.keep(self._office, rollout.id, [parcel])
            self._dirty |= rollout.take(parcel)
            self._advance(scene, now_s)
        except StoreUnavailable as error:
            self._fall_back(error)
            return False, self.standing()
        return True, self.standing()

    def incident(self, variant: str, kind: str, scene: Scene, now_s: float) -> Standing:
        """Something happened to a variant that no request may have seen."""
        try:
            rollout = self._active() if self._hold(now_s) else None
            if rollout is None or variant != rollout.plan.canary or rollout.state.phase == "pending":
                return self.standing()
            if now_s - self._died_s.get(kind, float("-inf")) >= _SAME_DEATH_S:
                self._died_s[kind] = now_s
                rollout.evidence.incident(kind, now_s)
                self._advance(scene, now_s, checkpoint=True)
        except StoreUnavailable as error:
            self._fall_back(error)
        return self.standing()

    # What an operator asks for

    def begin(self, plan: Plan, base: Split, notes: Mapping[str, Any], by: str, scene: Scene, now_s: float) -> str:
        """Start a rollout; one that runs is ended for it. `notes` go into its first line. Returns the id."""
        with self._in_office(now_s):
            if (running := self._active()) is not None:
                if running.state.phase == "rolling_back":
                    raise Conflict(f"rollout {running.id} is rolling back: wait until it has")
                entries, _ = running.supersede(plan.canary, now_s, by)
                self._commit(running, entries, now_s)
                base = running.split
            rollout, entry = Rollout.begin(f"r{len(self._store.ids()) + 1}", plan, base, now_s)
            started = replace(entry, facts={**entry.facts, **notes, "configured": self._configured, "by": by})
            self._freed -= {plan.canary, plan.stable}
            self._rollout, self._died_s = rollout, {}
            self._commit(rollout, [started], now_s)
            self._advance(scene, now_s)
            return rollout.id

    def order(self, id: str, order: Command, by: str, scene: Scene, now_s: float) -> None:
        """Pause, resume, promote or abort. Raises NotFound, or Conflict where it means nothing now."""
        with self._in_office(now_s):
            rollout = self._rollout
            if rollout is None or rollout.id != id:
                phase = self.whole(id).state.phase
                raise Conflict(f"rollout {id} is over ({phase}): start a new one")
            try:
                entries, _ = rollout.order(order, now_s, by)
            except InvalidRequest as error:
                raise Conflict(error.message) from error
            self._commit(rollout, entries, now_s)
            self._advance(scene, now_s)

    def moved_by_hand(self, split: Split, now_s: float) -> None:
        """Traffic was dealt anew while no rollout runs: remembered like everything else."""
        try:
            if self._hold(now_s):
                facts = {"split": split.to_dict(), "configured": self._configured}
                self._store.note(self._office, TRAFFIC, Entry("order", now_s, "traffic was moved by hand", facts))
        except StoreUnavailable as error:
            self._fall_back(error)
        self._split = split
        self._freed -= {name for name, weight in split.weights.items() if weight}

    # What can be read

    @property
    def current(self) -> Rollout | None:
        return self._rollout

    def whole(self, id: str) -> Rollout:
        """A rollout with its evidence, as it stands or stood. Raises NotFound."""
        if self._rollout is not None and self._rollout.id == id:
            return self._rollout
        if (loaded := self._store.load(id)) is None:
            raise NotFound(f"there is no rollout {id!r}; known: {', '.join(self._store.ids()) or 'none'}")
        return loaded

    def journal(self, id: str | None = None) -> list[Record]:
        return [record for record in self._store.journal(id) if record.rollout != TRAFFIC]

    def recorded(self, id: str) -> list[Outcome]:
        if id != TRAFFIC:
            self.whole(id)
        return self._store.recorded(id)

    def requests_per_s(self, now_s: float) -> float | None:
        """Requests that ended in the last minute; None where there were none."""
        recent = [(at_s, n) for at_s, n in self._seen if now_s - at_s <= _RATE_S]
        count = sum(n for _, n in recent)
        return count / max(1.0, now_s - recent[0][0]) if count else None

    def close(self) -> None:
        """Leave office, with all that was counted written down."""
        try:
            if self._opened and self._lease:
                if self._rollout:
                    self._opened.commit(self._lease, self._rollout)
                self._opened.release(self._lease)
        except StoreUnavailable as error:
            _LOG.warning("%s", error.message)
        if self._opened:
            self._opened.close()

    # The lease, and what was before

    @property
    def _store(self) -> Store:
        if self._opened is None:
            self._opened = self._open_store()
        return self._opened

    @property
    def _office(self) -> Lease:
        if self._lease is None:
            raise LeaseLost("this controller is not in office")
        return self._lease

    @contextmanager
    def _in_office(self, now_s: float) -> Iterator[None]:
        """For what an operator asks: done and written down, or refused with the reason and not done at all."""
        try:
            if self._hold(now_s):
                yield
                return
        except StoreUnavailable as error:
            self._fall_back(error)
        raise VariantUnavailable(f"rollouts cannot be controlled now: {self._problem}", retry_after_s=_LEASE_S)

    def _hold(self, now_s: float) -> bool:
        """In office, and knowing what a predecessor knew; False while another controller is."""
        if self._lease and 0 <= now_s - self._renewed_s < _LEASE_S / 3:
            return True
        before, self._lease = self._lease, self._store.acquire(self._holder, now_s, _LEASE_S)
        if self._lease is None:
            self._problem = (
                "another controller is in office; if it is not this server's, give each a store of its own "
                "(rollouts.store)"
            )
            return False
        self._renewed_s = now_s
        if before != self._lease:
            self._remember()
        return True

    def _remember(self) -> None:
        """Read all that the journal knows: who was freed, what was dealt last, and the rollout that was begun last."""
        records = self._store.journal()
        self._rollout = self._resumed()
        self._freed, self._verdicts = set(), {}
        plans: dict[str, Mapping[str, Any]] = {}
        split, configured = None, None
        for record in records:
            if record.kind == "started":
                plans[record.rollout] = record.facts
                self._freed -= {record.facts["plan"]["canary"], record.facts["plan"]["stable"]}
            if record.kind == "verdict":
                self._count_verdict(plans[record.rollout]["plan"]["canary"], record.facts["result"])
            if record.kind == "transition":
                self._freed |= _freed_by(plans[record.rollout]["plan"], record.facts["state"])
            if "split" in record.facts:
                split, configured = record.facts["split"], plans.get(record.rollout, record.facts).get("configured")
                if record.rollout == TRAFFIC:
                    self._freed -= {name for name, weight in split["weights"].items() if weight}
        self._active_id = active.id if (active := self._active()) else None
        known = split is not None and set(split["weights"]) <= self._variants
        if active is None and (configured != self._configured or not known):
            split = None
        self._split = active.split if active else Split.from_dict(split) if split else None

    def _resumed(self) -> Rollout | None:
        """The rollout that was begun last, if this configuration still has both of its variants."""
        if (latest := self._store.latest()) is None or (rollout := self._store.load(latest)) is None:
            return None
        if {rollout.plan.stable, rollout.plan.canary} - self._variants:
            if not rollout.state.ended:
                _LOG.warning("rollout %s waits: this configuration lacks one of its variants", rollout.id)
            return None
        return rollout

    def _fall_back(self, error: StoreUnavailable) -> None:
        """What is in memory may be ahead of what is written down: forget it, and read it again when the store is back.

        The split in force stays."""
        if self._problem != error.message:
            _LOG.warning("%s; the split in force stays", error.message)
        self._problem = error.message
        self._lease = self._rollout = None
        self._news.clear()

    # Moving on

    def _active(self) -> Rollout | None:
        return self._rollout if self._rollout and not self._rollout.state.ended else None

    def _advance(self, scene: Scene, now_s: float, *, checkpoint: bool = False) -> None:
        if (rollout := self._rollout) is None:
            return
        was_over = rollout.state.ended
        canary = rollout.plan.canary
        entries, actions = rollout.tick(
            now_s,
            ready=scene.ready(canary),
            load_error=scene.load_error(canary),
            applied=scene.applied_revision >= rollout.split.revision,
        )
        stale = self._dirty and not 0 <= now_s - self._checkpoint_s < _CHECKPOINT_S
        if entries or checkpoint or stale or actions:
            self._commit(rollout, entries, now_s, over=was_over)

    def _commit(self, rollout: Rollout, entries: list[Entry], now_s: float, *, over: bool = False) -> None:
        """Into the journal; only then is it true. Where another has taken the office it never was."""
        self._store.commit(self._office, rollout, entries)
        self._dirty, self._checkpoint_s = False, now_s
        if rollout is self._rollout:
            self._active_id = None if rollout.state.ended else rollout.id
        if not over:
            self._split = rollout.split
        for entry in entries:
            self._news.append(News(rollout.id, rollout.plan.stable, rollout.plan.canary, entry))
            if entry.kind == "verdict":
                self._count_verdict(rollout.plan.canary, entry.facts["result"])
            if entry.kind == "transition":
                self._freed |= _freed_by(rollout.plan.to_dict(), entry.facts["state"])

    def _count_verdict(self, canary: str, result: str) -> None:
        self._verdicts[canary, result] = self._verdicts.get((canary, result), 0) + 1

    def _record(self, parcel: Batch) -> None:
        """Traffic without a rollout, for `certify`."""
        if not self._recorded_parcels or not parcel.outcomes:
            return
        self._store.keep(self._office, TRAFFIC, [parcel])
        self._recorded += 1
        if self._recorded % 100 == 1:
            self._store.prune(self._office, TRAFFIC, self._recorded_parcels)


def _freed_by(plan: Mapping[str, Any], state: Mapping[str, Any]) -> set[str]:
    """Whose memory a transition into this state gives back."""
    if state["phase"] == "succeeded" and plan["free_stable"]:
        return {plan["stable"]}
    return {plan["canary"]} if state["freed"] else set()


def default_store(model_name: str) -> str:
    """`HALFTONE_STATE`, or the user's state folder: one SQLite file per model name."""
    state = os.environ.get("HALFTONE_STATE") or os.path.join(  # noqa: PTH118  an empty variable is none
        os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state"), "halftone"
    )
    folder = Path(state).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailable(f"the rollout store's folder {folder} cannot be made: {error.strerror}") from error
    return f"sqlite:///{folder / ('rollouts-' + re.sub(r'[^A-Za-z0-9.-]', '_', model_name) + '.db')}"
