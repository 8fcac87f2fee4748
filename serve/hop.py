"""How tokens cross from a replica to an ingress: one message per engine step and ingress, not one per stream.

Every request is one call of Ray Serve's, so that its routing, backpressure, accounting and draining hold. But a message
through Ray costs about a millisecond whatever it carries, so the call returns only at the end, and what is said
meanwhile goes over a connection of our own (`serve.wire`), which all requests of one ingress share.

    replica                                          ingress
    engine step -> Outbox.put(events)                Inbox.accept(parcel) -> Mailbox of each call
                     |                                  ^
                     +---- Parcel, Parcel, Parcel ... --+

A parcel takes whatever has gathered since the last one left: the first token never waits, and a slow way packs more.
A request ends once the last event of it has left. Its call may return before that event arrives: whoever waits for
both gives the slower one a moment.

Plain asyncio: no Ray, no sockets, no engine, no HTTP. All calls on one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from serve.errors import HalftoneError, VariantUnavailable
from serve.generation import Delta, Event, Failure, GenerationRequest, PromptDelta

__all__ = ["Inbox", "Mailbox", "Outbox", "Parcel", "ReplicaDied", "fold"]


class ReplicaDied(VariantUnavailable):
    """The replica went away under a request. Before its first token the request may be tried elsewhere."""


_FOLD_AT = 256
"""Events that a slow reader may leave lying before they are merged, one per choice."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """The events of one or more engine steps for one ingress."""

    replica: str
    events: tuple[Event, ...]


class Outbox:
    """The replica's end of one way to an ingress: what is open there, and what could not leave yet.

    It begins shut. `lead` opens it, to whatever takes a parcel at once; `shut` is for a way that is full, `fail` for
    one that has broken: it ends all that is open.
    """

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._way: Callable[[Parcel], None] | None = None
        self._pending: list[Event] = []
        self._unfinished: dict[str, int] = {}  # choices that have not ended, by request
        self._ends: dict[str, asyncio.Future[None]] = {}

    def lead(self, way: Callable[[Parcel], None]) -> None:
        self._way = way
        self._send()

    def shut(self) -> None:
        self._way = None

    def fail(self, error: HalftoneError) -> None:
        for request_id in list(self._unfinished):
            self._end(request_id, error)
        self._pending.clear()

    def open(self, request: GenerationRequest) -> None:
        """Before the request's first event."""
        self._unfinished[request.request_id] = request.n
        self._ends[request.request_id] = asyncio.get_running_loop().create_future()

    def put(self, events: Iterable[Event]) -> None:
        """What one engine step made; events of requests that are not open here (any more) are dropped."""
        self._pending += [event for event in events if event.request_id in self._unfinished]
        self._send()

    def close(self, request_id: str) -> None:
        """End a request here and now: what waits of it is dropped."""
        if request_id in self._unfinished:
            self._pending = [event for event in self._pending if event.request_id != request_id]
            self._end(request_id)

    async def ended(self, request_id: str) -> None:
        """Wait for the end of an open request. Raises what broke the way."""
        try:
            await self._ends[request_id]
        finally:
            self.close(request_id)
            del self._ends[request_id]

    def _send(self) -> None:
        if self._way is None or not self._pending:
            return
        events, self._pending = tuple(self._pending), []
        self._way(Parcel(self._replica, events))
        for event in events:
            self._account(event)

    def _account(self, event: Event) -> None:
        left = self._unfinished.get(event.request_id, 0) - ended_choices(event)
        if isinstance(event, Failure) or left <= 0:
            self._end(event.request_id)
        else:
            self._unfinished[event.request_id] = left

    def _end(self, request_id: str, error: HalftoneError | None = None) -> None:
        if self._unfinished.pop(request_id, None) is None or (end := self._ends[request_id]).done():
            return
        if error:
            end.set_exception(error)
        else:
            end.set_result(None)


class Mailbox:
    """The ingress's end of one call: the events of all its requests, in order, until each has ended.

    `observe` sees every event the moment it arrives, however slowly the reader takes it. What lies here is bounded by
    the tokens that the call may make: a backlog is folded to one delta per choice. What comes of a request after its
    end changes nothing, and a second `PromptDelta`, from a second try, is dropped.
    """

    def __init__(self, requests: Sequence[GenerationRequest], observe: Callable[[Event], None]) -> None:
        self._unfinished = {request.request_id: request.n for request in requests}
        self._opened: set[str] = set()
        self._begun: set[str] = set()
        self._ends = {request.request_id: asyncio.Event() for request in requests}
        self._cut_short: set[str] = set()
        self._observe = observe
        self._events: deque[Event] = deque()
        self._bell = asyncio.Event()

    @property
    def unfinished(self) -> frozenset[str]:
        return frozenset(self._unfinished)

    async def ended(self, request_id: str) -> None:
        """Wait for the last event of one request to arrive."""
        await self._ends[request_id].wait()

    def close(self) -> frozenset[str]:
        """The reader has gone: take nothing more. Which requests that cuts short."""
        unfinished = self.unfinished
        self._cut_short |= unfinished
        for request_id in unfinished:
            self._end(request_id)
        self._events.clear()
        self._bell.set()
        return unfinished

    def is_cut_short(self, request_id: str) -> bool:
        """It failed, or the reader went away before its end."""
        return request_id in self._cut_short

    def has_begun(self, request_id: str) -> bool:
        """Tokens of it have come: it can no longer begin again unseen."""
        return request_id in self._begun

    def is_unanswered(self, request_id: str) -> bool:
        """Nothing of it has come, and it has not ended."""
        return request_id in self._unfinished and request_id not in self._opened | self._begun

    @property
    def is_untouched(self) -> bool:
        """Nothing of any request has come: the reader does not know yet who answers."""
        return not (self._opened or self._begun)

    def put(self, event: Event) -> None:
        if event.request_id not in self._unfinished or self._is_repeated(event):
            return
        self._account(event)
        self._observe(event)
        self._events.append(event)
        if len(self._events) >= _FOLD_AT:
            self._events = deque(fold(self._events))
        self._bell.set()

    def _is_repeated(self, event: Event) -> bool:
        return isinstance(event, PromptDelta) and event.request_id in self._opened

    def _account(self, event: Event) -> None:
        (self._opened if isinstance(event, PromptDelta) else self._begun).add(event.request_id)
        if isinstance(event, Failure):
            self._cut_short.add(event.request_id)
        left = 0 if isinstance(event, Failure) else self._unfinished[event.request_id] - ended_choices(event)
        if left:
            self._unfinished[event.request_id] = left
        else:
            self._end(event.request_id)

    def _end(self, request_id: str) -> None:
        del self._unfinished[request_id]
        self._ends[request_id].set()

    async def take(self) -> Event | None:
        """The next event; None after the last."""
        while not self._events:
            if not self._unfinished:
                return None
            self._bell.clear()
            await self._bell.wait()
        return self._events.popleft()


class Inbox:
    """The ingress's end of all ways from all replicas: events are dealt out to the calls' mailboxes."""

    def __init__(self) -> None:
        self._mailboxes: dict[str, Mailbox] = {}
        self._served_by: dict[str, str] = {}  # request -> replica, once an event of it has come
        self._refused: dict[str, str] = {}  # request -> the replica that it was taken away from

    @property
    def open_requests(self) -> int:
        return len(self._mailboxes)

    def open(self, request_id: str, mailbox: Mailbox) -> None:
        self._mailboxes[request_id] = mailbox

    def close(self, request_id: str) -> None:
        """Nobody waits for this request any more; what still comes of it is dropped."""
        for table in (self._mailboxes, self._served_by, self._refused):
            table.pop(request_id, None)

    def reassign(self, request_id: str) -> None:
        """The request begins again on another replica; what the first one may still have on its way is refused."""
        if replica := self._served_by.pop(request_id, None):
            self._refused[request_id] = replica

    def accept(self, parcel: Parcel) -> None:
        for event in parcel.events:
            mailbox = self._mailboxes.get(event.request_id)
            if mailbox is not None and self._refused.get(event.request_id) != parcel.replica:
                self._served_by[event.request_id] = parcel.replica
                mailbox.put(event)

    def fail(self, request_id: str, error: HalftoneError) -> None:
        if mailbox := self._mailboxes.get(request_id):
            mailbox.put(Failure(request_id, error))


def ended_choices(event: Event) -> int:
    return int(isinstance(event, Delta) and event.finish_reason is not None)


def fold(events: Iterable[Event]) -> list[Event]:
    """The same answer in fewer events: adjacent deltas of each choice become one, first things stay first."""
    folded: dict[tuple[str, int], Event] = {}
    for event in events:
        key = (event.request_id, event.choice_index if isinstance(event, Delta) else _KEYS[type(event)])
        before = folded.get(key)
        folded[key] = _joined(before, event) if isinstance(before, Delta) and isinstance(event, Delta) else event
    return list(folded.values())


_KEYS: dict[type[Event], int] = {PromptDelta: -1, Failure: -2}


def _joined(first: Delta, second: Delta) -> Delta:
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
    )
