"""Experiments on the controller's event loop: one thread keeps the laboratory, one task ticks, splits are dealt.

The loop is never blocked: counting, reporting and writing down go through one thread, in order. Knows neither Ray nor
HTTP. An experiment and a rollout both own the split, so that neither starts while the other runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar

from serve.config import Config
from serve.errors import Conflict, VariantUnavailable
from serve.experiment import Facts, Laboratory
from serve.office import default_store
from serve.rollout import Batch, Split

__all__ = ["Experimentation", "House", "Rival"]

_LOG = logging.getLogger(__name__)
_TICK_S: Final = 1.0
T = TypeVar("T")


class House(Protocol):
    """What experiments ask of the controller. All of it from memory, on the loop."""

    @property
    def split(self) -> Split: ...

    def deal(self, split: Split) -> None: ...

    def variants(self) -> Sequence[Mapping[str, Any]]: ...


class Rival(Protocol):
    """Who else moves traffic: the rollouts."""

    def require_idle(self, what: str) -> None: ...

    async def moved_by_hand(self, split: Split) -> None: ...


class Experimentation:
    """One controller's experiments. `open`, then calls, then `close`; all on one event loop."""

    def __init__(self, config: Config, house: House, rival: Rival, clock: Callable[[], float] = time.time) -> None:
        self._url = config.rollouts.store
        self._model_name = config.model_name
        self._names = [variant.name for variant in config.variants]
        self._house = house
        self._rival = rival
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="laboratory")
        self._laboratory: Laboratory | None = None
        self._ticking: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Go on with the experiment that the last controller ran, if there was one."""
        self._laboratory = await self._call(self._opened)
        if (split := self._laboratory.split) is not None:
            self._house.deal(split)
        self._ticking = asyncio.get_running_loop().create_task(self._tick_for_ever())

    async def close(self) -> None:
        if self._ticking:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        self._thread.shutdown(wait=False)

    def require_idle(self, what: str) -> None:
        """Raises Conflict while an experiment owns the split."""
        if self._laboratory and (active := self._laboratory.active):
            raise Conflict(f"{what} is not possible while experiment {active.plan.name!r} is {active.state}: stop it")

    async def take(self, batch: Batch) -> None:
        await self._call(self._known.take, batch)

    async def start(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raises ConfigError by the key, and Conflict while another experiment or a rollout runs."""
        self._rival.require_idle("an experiment")
        known, in_force = self._known, self._house.split
        split = await self._call(known.start, body, in_force, self._names, self._facts(), self._clock())
        if split is not None:
            self._house.deal(split)
        return known.describe(str(body["name"]))

    async def stop(self, name: str) -> Mapping[str, Any]:
        """Raises NotFound."""
        await self._give_back(await self._call(self._known.stop, name, self._house.split, self._clock()))
        return self._known.describe(name)

    async def all(self) -> Mapping[str, Any]:
        return self._known.list()

    async def report(self, name: str) -> Mapping[str, Any]:
        """Raises NotFound."""
        return await self._call(self._known.report, name, self._facts(), self._clock())

    @property
    def _known(self) -> Laboratory:
        if self._laboratory is None:
            raise VariantUnavailable("the server is starting; try again shortly", retry_after_s=1.0)
        return self._laboratory

    def _opened(self) -> Laboratory:
        from serve.experiment.store import DatabaseShelf

        return Laboratory(DatabaseShelf(self._url or default_store(self._model_name)))

    async def _tick_for_ever(self) -> None:
        while True:
            try:
                was = self._known.active
                split = await self._call(self._known.tick, self._house.split, self._facts(), self._clock())
                if was and self._known.active is None:
                    await self._give_back(split)
                elif split is not None:
                    self._house.deal(split)
            except Exception:  # noqa: BLE001  the watch must go on, whatever one look ran into
                _LOG.exception("the experiment could not be moved on; the split in force stays")
            await asyncio.sleep(_TICK_S)

    async def _give_back(self, split: Split | None) -> None:
        """Traffic as it was, and remembered as such."""
        if split is not None:
            self._house.deal(split)
            await self._rival.moved_by_hand(self._house.split)

    def _facts(self) -> dict[str, Facts]:
        return {row["name"]: _facts(row) for row in self._house.variants()}

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _facts(row: Mapping[str, Any]) -> Facts:
    ratio = (row["load_report"] or {}).get("compression_ratio")
    saved = 1.0 - 1.0 / ratio if ratio else None
    energy = row["energy"]
    return Facts(
        row["precision"],
        max(1, row["ready_replicas"]),
        row["memory_bytes"],
        saved,
        energy_joules=energy["joules"],
        generation_tokens=energy["tokens"] or 0.0,
        energy_measured=energy["measured"],
        co2_grams_per_kwh=energy["co2_grams_per_kwh"],
    )
