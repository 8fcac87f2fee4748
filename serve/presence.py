"""Who is there to answer, as one ingress knows it: by the controller's newest word, and by the deaths that it has met.

A request that meets a dead replica knows of it seconds before anybody else. So the variant counts as absent here and
now, the controller is told out of turn, and requests that still wait for an answer of it are set free to go elsewhere
instead of waiting for a process that may die again as soon as it has loaded.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from serve.heartbeat import VariantState, View
from serve.hop import ReplicaDied
from serve.rollout import Split

__all__ = ["Gone", "Presence"]

T = TypeVar("T")
_RETRY_S = 5.0


class Gone(ReplicaDied):
    """The variant went away while a request waited for it."""


class Presence:
    """view: the newest one; serving: its split as it can be dealt right now. One event loop."""

    def __init__(self) -> None:
        self.view: View | None = None
        self.serving: Split | None = None
        self.deaths: dict[str, int] = {}
        self.news = asyncio.Event()
        """Something that the controller should hear at once."""
        self._absent: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._present: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def see(self, view: View) -> bool:
        """Take the controller's word; False for one that a newer one has overtaken."""
        if self.view and view.split.revision < self.view.split.revision:
            return False
        if self.view and view.is_young:
            view = replace(view, variants=tuple(map(self._unless_unheard, view.variants)))
        self._adopt(view)
        return True

    def mourn(self, variant: str, death: ReplicaDied) -> None:
        """A replica of it died under a request. The only one leaves nobody to ask."""
        if isinstance(death, Gone):  # known already
            return
        self.deaths[variant] = self.deaths.get(variant, 0) + 1
        self.news.set()
        if self.view and not self.has_another(variant):
            states = (_dead(state) if state.name == variant else state for state in self.view.variants)
            self._adopt(replace(self.view, variants=tuple(states)))

    def has_another(self, variant: str) -> bool:
        """Beside the replica that died, one is ready."""
        return any(s.name == variant and s.ready_replicas > 1 for s in self.view.variants) if self.view else False

    async def returns(self, variant: str, within_s: float) -> bool:
        """Wait for it to be ready; False if it is not in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                return await self._present[variant].wait()
        return False

    async def guarded(self, variant: str, call: Coroutine[Any, Any, T], is_unanswered: Callable[[], bool]) -> T:
        """What the call returns; ReplicaDied if the variant goes away while nothing at all has come for the request."""
        answering = asyncio.ensure_future(call)
        absent = asyncio.ensure_future(self._absent[variant].wait())
        try:
            await asyncio.wait({answering, absent}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and is_unanswered():
                raise Gone(f"variant {variant!r} went away; try again", retry_after_s=_RETRY_S)
            return await answering
        finally:
            absent.cancel()
            answering.cancel()

    def _adopt(self, view: View) -> None:
        self.view = view
        self.serving = view.serving()
        for state in view.variants:
            here, away = self._present[state.name], self._absent[state.name]
            if state.state != "ready":
                here, away = away, here
            here.set()
            away.clear()

    def _unless_unheard(self, state: VariantState) -> VariantState:
        """A controller that has just started has not heard of everybody: what was known before still holds."""
        before = next((known for known in self.view.variants if known.name == state.name), None) if self.view else None
        return before if before and not state.is_heard else state


def _dead(state: VariantState) -> VariantState:
    return replace(state, state="loading", stage="restarting", ready_replicas=0)
