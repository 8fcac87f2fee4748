"""Rollouts on the controller's event loop: one thread keeps the office, one task ticks, what is written down is done.

The loop is never blocked: every call to the office (`serve.office`, which waits for a database) goes through one
thread, in order. What comes back is a `Standing`, and it is applied here: the split to the controller, news to the
webhooks. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from typing import Any, Final, Protocol, TypeVar, get_args
from uuid import uuid4

from serve import metrics
from serve.config import Config
from serve.errors import ConfigError, Conflict, VariantUnavailable
from serve.metrics import Recorder, Snapshot, VariantLabels
from serve.office import TRAFFIC, News, Office, Scene, Standing, default_store
from serve.rollout import Batch, Plan, Split
from serve.rollout.estimate import Estimate, Traffic, estimate
from serve.rollout.judge import Result
from serve.rollout.machine import MOVES, Command
from serve.rollout.measures import MEASURES
from serve.rollout.proposal import Proposal
from serve.rollout.store import Store
from serve.rollout.story import history, overview, summary
from serve.variant import Variant

__all__ = ["House", "Progression"]

_LOG = logging.getLogger(__name__)
_TICK_S: Final = 1.0
_WRITE_S: Final = 2.0
_LONGEST_QUEUE: Final = 256
_ORDERS: Final[Mapping[str, Command]] = {
    "pause": "pause", "resume": "resume", "approve": "promote", "promote": "promote", "abort": "abort",
}  # fmt: skip
T = TypeVar("T")


class House(Protocol):
    """What a progression asks of the controller. All of it from memory, on the loop."""

    @property
    def split(self) -> Split: ...

    def scene(self) -> Scene: ...

    def deal(self, split: Split) -> None:
        """Put a split in force, if it is newer than the one that is."""
        ...

    def load_report(self, variant: str) -> Mapping[str, Any] | None:
        """What the variant's last load said of itself, if a replica has told."""
        ...

    def free(self, variants: frozenset[str]) -> None:
        """These variants give their memory back, and no others."""
        ...

    def room_for(self, canary: str) -> str:
        """The arithmetic, or a Conflict with it where memory for both is lacking."""
        ...

    def on_death(self, told: Callable[[str], None]) -> None:
        """Call `told(variant)` for every replica that died."""
        ...


class Progression:
    """One controller's rollouts. `open`, then calls, then `close`; all on one event loop."""

    def __init__(
        self,
        config: Config,
        house: House,
        clock: Callable[[], float] = time.time,
        announce: Callable[[News], None] = lambda news: None,
    ) -> None:
        self._config = config
        self._house = house
        self._clock = clock
        self._announce = announce
        settings = config.rollouts
        self._office = Office(
            lambda: Store(settings.store or default_store(config.model_name)),
            f"controller-{uuid4().hex[:12]}",
            [variant.name for variant in config.variants],
            config.split,
            settings.recorded_parcels,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="office")
        self._waiting = 0
        self._standing = Standing()
        self._tasks: set[asyncio.Task[Any]] = set()
        house.on_death(self._on_death)

    # Life

    async def open(self) -> None:
        """Deal as the last controller did, then take office as soon as its lease has run out."""
        self._apply(await self._call(self._office.recall))
        self._spawn(self._tick_for_ever())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._call(self._office.close)
        self._thread.shutdown(wait=False)

    @property
    def standing(self) -> Standing:
        return self._standing

    def snapshot(self) -> Snapshot:
        """The phase of the rollout that was begun last, and the verdicts so far."""
        recorder, labels = Recorder(), {v.name: self._labels(v) for v in self._config.variants}
        for variant, result in product(labels, get_args(Result)):
            count = self._standing.verdicts.get((variant, result), 0)
            recorder.set(metrics.ROLLOUT_VERDICTS, labels[variant], count, result)
        if self._standing.canary in labels:
            for phase in MOVES:
                at = float(phase == self._standing.phase)
                recorder.set(metrics.ROLLOUT_PHASE, labels[self._standing.canary], at, phase)
        return recorder.snapshot()

    def _labels(self, variant: Variant) -> VariantLabels:
        return VariantLabels(self._config.model_name, variant.name, variant.precision)

    # What happens

    async def take(self, batch: Batch) -> bool:
        """Evidence from an ingress. False: it is not written down yet, and must be sent again."""
        if self._waiting >= _LONGEST_QUEUE:
            return False
        taken = asyncio.ensure_future(self._call(self._office.take, batch, self._house.scene(), self._clock()))
        done, _ = await asyncio.wait([taken], timeout=_WRITE_S)
        if not done:
            self._tasks.add(taken)
            taken.add_done_callback(self._on_late)
            return False
        counted, standing = taken.result()
        self._apply(standing)
        return counted

    def require_idle(self, what: str) -> None:
        """Raises Conflict while a rollout owns the split."""
        if self._standing.active:
            raise Conflict(
                f"{what} is not possible while rollout {self._standing.active} to {self._standing.canary} runs "
                f"({self._standing.phase}): abort it first, or let it end"
            )

    async def moved_by_hand(self, split: Split) -> None:
        await self._call(self._office.moved_by_hand, split, self._clock())
        self._apply(await self._call(self._office.standing))

    async def tick(self) -> None:
        """Judge and move on; once a second, and whenever something has changed."""
        self._apply(await self._call(self._office.tick, self._house.scene(), self._clock()))

    async def _tick_for_ever(self) -> None:
        while True:
            try:
                await self.tick()
            except Exception:  # noqa: BLE001  the watch must go on, whatever one look ran into
                _LOG.exception("the rollout could not be moved on; the split in force stays")
            await asyncio.sleep(_TICK_S)

    def _on_death(self, variant: str) -> None:
        self._spawn(self._incident(variant))

    async def _incident(self, variant: str) -> None:
        told = (variant, "replica_died", self._house.scene(), self._clock())
        self._apply(await self._call(self._office.incident, *told))

    def _on_late(self, taken: asyncio.Task[tuple[bool, Standing]]) -> None:
        self._tasks.discard(taken)
        if not taken.cancelled() and taken.exception() is None:
            self._apply(taken.result()[1])

    def _apply(self, standing: Standing) -> None:
        self._standing = replace(standing, news=())
        if standing.split is not None:
            self._house.deal(standing.split)
        self._house.free(standing.freed)
        for news in standing.news:
            self._announce(news)

    # What an operator asks for

    async def start(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Begin a rollout, or with `dry_run` say what it would need. Raises ConfigError, NotFound, Conflict."""
        proposal = Proposal.read(body)
        plan, expected_from = self._plan(proposal)
        memory = self._house.room_for(plan.canary)
        if proposal.dry_run:
            needs = await self._call(self._estimate, plan)
            return {
                "plan": plan.to_dict(),
                "expected_from": expected_from,
                "memory": memory,
                "needs": needs.to_dict(),
            }
        self._refuse_unwatched(plan)
        notes = {"expected_from": expected_from, "memory": memory}
        scene, now_s = self._house.scene(), self._clock()
        id = await self._call(self._office.begin, plan, self._house.split, notes, proposal.by, scene, now_s)
        self._apply(await self._call(self._office.standing))
        return await self.show(id)

    async def order(self, id: str, order: str, by: str) -> Mapping[str, Any]:
        """Raises NotFound for an unknown rollout, Conflict for an order that means nothing now."""
        scene = self._house.scene()
        await self._call(self._office.order, id, _ORDERS[order], by, scene, self._clock())
        self._apply(await self._call(self._office.standing))
        return await self.show(id)

    async def all(self) -> Mapping[str, Any]:
        rows = await self._call(lambda: overview(self._office.journal(), self._clock()))
        return {"active": self._standing.active, "rollouts": rows}

    async def show(self, id: str) -> Mapping[str, Any]:
        return await self._call(self._detail, id)

    async def history(self, id: str) -> Mapping[str, Any]:
        return await self._call(lambda: {"id": id, "lines": self._lines(id)})

    async def recorded(self, id: str) -> Mapping[str, Any]:
        """The outcomes that are kept of a rollout with its plan, or, for "traffic", those that came without one."""
        return await self._call(self._recorded, id)

    def _refuse_unwatched(self, plan: Plan) -> None:
        """A quality guard that nothing measures here would hold the rollout for ever."""
        scored = self._config.drift is not None and self._config.drift.sample_rate > 0.0
        if not scored and (unwatched := [name for name in plan.guards if MEASURES[name].kind == "level"]):
            raise ConfigError(
                f"rollout.guards.{unwatched[0]}",
                "this server scores no live quality, so the guard could never pass: add `drift: {sample_rate: 0.05}` "
                f"to its configuration, or leave out {', '.join(unwatched)} (null; at the terminal --guard NAME=off)",
            )

    def _plan(self, proposal: Proposal) -> tuple[Plan, str]:
        variants = {variant.name: variant for variant in self._config.variants}
        if proposal.to not in variants:
            raise ConfigError("rollout.to", f"unknown variant {proposal.to!r}; allowed: {', '.join(variants)}")
        measured = (self._house.load_report(proposal.to) or {}).get("quality")
        return proposal.plan(self._house.split.stable, variants[proposal.to].precision, measured)

    # On the office's thread

    def _estimate(self, plan: Plan) -> Estimate:
        rate = self._office.requests_per_s(self._clock())
        return estimate(plan, Traffic(requests_per_s=rate) if rate else Traffic())

    def _detail(self, id: str) -> dict[str, Any]:
        rollout, rows = self._office.whole(id), self._office.journal(id)
        n_canary, n_stable = rollout.evidence.n(rollout.state.step)
        return {
            **summary(rows, self._clock(), None if rollout.state.ended else rollout.verdict),
            "plan": rollout.plan.to_dict(),
            "split": rollout.split.to_dict(),
            "n_step": {"canary": n_canary, "stable": n_stable},
            "lines": [asdict(line) for line in history(rows)],
            "needs": self._estimate(rollout.plan).to_dict(),
            "expected_from": rows[0].facts.get("expected_from"),
            "memory": rows[0].facts.get("memory"),
            "verdict": rollout.verdict.to_dict() if rollout.verdict else None,
        }

    def _recorded(self, id: str) -> dict[str, Any]:
        outcomes = [outcome.to_dict() for outcome in self._office.recorded(id)]
        plan = None if id == TRAFFIC else self._office.whole(id).plan.to_dict()
        stable = plan["stable"] if plan else self._house.split.stable
        return {"id": id, "stable": stable, "plan": plan, "outcomes": outcomes}

    def _lines(self, id: str) -> list[dict[str, Any]]:
        self._office.whole(id)
        return [asdict(line) for line in history(self._office.journal(id))]

    # The thread

    async def _call(self, work: Callable[..., T], *arguments: Any) -> T:
        if self._waiting >= _LONGEST_QUEUE:
            raise VariantUnavailable("the rollout store is too slow for what is asked of it", retry_after_s=5.0)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*arguments))
        finally:
            self._waiting -= 1

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
