"""Shadow traffic at an ingress: a share of requests is asked of a second variant too, and the answers are compared.

The client never waits for it nor sees its errors, and no request metric counts it: what it leaves is an `Outcome` with
`shadow` set, paired with the served one, and `shadow_requests_total` by result. Bounded in number and in time, and the
first to give way: nothing is mirrored while users wait anywhere. The seed is the served request's, so a variant that
thinks alike answers alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from serve.api.backend import Call
from serve.heartbeat import VariantState, View
from serve.hop import Mailbox
from serve.journal import Journal, Trace
from serve.pairs import SHADOW_PRIORITY
from serve.rollout import shadows

__all__ = ["Mirror"]

_OPEN_SHADOWS = 8
_LONGEST_S = 60.0

Ended = Callable[[], Awaitable[None]]
Ask = Callable[[Call, VariantState, Trace], tuple[Mailbox, Callable[[], None]]]
"""Begin a call on a variant, nobody reading; and what ends it early."""


class Mirror:
    """The shadows of one ingress. All methods on one event loop; `ask` and the tasks are the router's."""

    def __init__(self, journal: Journal, ask: Ask) -> None:
        self._journal = journal
        self._ask = ask
        self._open = 0

    def draw(self, call: Call, served_by: VariantState, view: View) -> list[VariantState]:
        """Who is to see this call too. Calls of several texts or choices are left out: one answer has one pair."""
        if len(call.requests) != 1 or call.requests[0].n != 1:
            return []
        names = [name for name in shadows(view.split, call.requests[0].request_id) if name != served_by.name]
        drawn = [state for state in view.variants if state.name in names]
        return [state for state in drawn if self._admits(state, view)]

    def _admits(self, state: VariantState, view: View) -> bool:
        if state.state != "ready":
            self._journal.mirrored(state, "unavailable")
            return False
        if self._open >= _OPEN_SHADOWS or view.users_wait:
            self._journal.mirrored(state, "shed")
            return False
        self._open += 1
        return True

    async def run(self, call: Call, state: VariantState, served: Trace, ended: Ended, view: View) -> None:
        """One shadow from its start to its comparison. served: hears the answer; ended: waits for its end."""
        request = call.requests[0]
        name = f"{request.request_id}-shadow-{state.name}"
        shadow = replace(call, requests=(replace(request, request_id=name, priority=SHADOW_PRIORITY),), stream=False)
        trace = self._journal.open_shadow(shadow, state, view.split, served)
        mailbox, cancel = self._ask(shadow, state, trace)
        try:
            async with asyncio.timeout(_LONGEST_S):
                await mailbox.ended(name)
                await ended()
        except TimeoutError:
            cancel()
            self._journal.mirrored(state, "timeout")
        else:
            failed = mailbox.is_cut_short(name)
            if not failed:
                trace.compare(served)
            self._journal.mirrored(state, "failed" if failed else "compared")
        finally:
            self._open -= 1
