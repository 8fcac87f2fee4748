"""How tokens cross from a replica to an ingress: one message per engine step and ingress, not one per stream.

Every request is one streaming call of Ray Serve's, so that its routing, backpressure, accounting and draining hold. But
a message costs about a millisecond whatever it carries, so the open streams that one ingress has on one replica share
the ride: the **oldest** carries the events of all of them, the others are silent.

    replica                                    ingress
    engine step -> Outbox.put(events)          Inbox.accept(parcel) -> Mailbox of each call
                     |   oldest stream yields     ^
                     +---- Parcel 0, 1, 2 ... ----+

A parcel takes whatever has gathered since the last one left: the first token never waits, and a slow hop packs more.
A stream ends once the last event of its request has been handed out, by whichever stream; then the next oldest carries.
Two streams may overtake one another on the way, so parcels are numbered and the inbox puts them back in order.

Plain asyncio: no Ray, no engine, no HTTP. All calls on one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
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
    """The events of one or more engine steps for one ingress. `number` counts from 0 per replica and channel."""

    replica: str
    channel: str
    number: int
    events: tuple[Event, ...]


class Outbox:
    """The replica's end of one channel: events of one ingress's requests, waiting to be carried."""

    def __init__(self, replica: str, channel: str) -> None:
        self._replica = replica
        self._channel = channel
        self._number = 0
        self._pending: list[Event] = []
        self._unfinished: dict[str, int] = {}  # choices that have not ended, by request
        self._riders: dict[str, asyncio.Event] = {}  # open streams, oldest first

    def open(self, request: GenerationRequest) -> None:
        """Before the request's first event."""
        self._unfinished[request.request_id] = request.n

    def put(self, events: Iterable[Event]) -> None:
        """What one engine step made; events of requests that are not open here (any more) are dropped."""
        self._pending += [event for event in events if event.request_id in self._unfinished]
        self._wake_carrier()

    async def carry(self, request_id: str) -> AsyncGenerator[Parcel, None]:
        """The stream of one request: parcels while it is the oldest, nothing otherwise; ends with its request."""
        bell = self._riders.setdefault(request_id, asyncio.Event())
        self._wake_carrier()
        try:
            while request_id in self._unfinished:
                await bell.wait()
                bell.clear()
                while self._pending and self._carrier() == request_id and request_id in self._unfinished:
                    yield self._pack()
        finally:
            del self._riders[request_id]
            self.close(request_id)
            self._wake_carrier()

    def close(self, request_id: str) -> None:
        """End a request here and now: what waits of it is dropped and its stream ends."""
        if self._unfinished.pop(request_id, None) is not None:
            self._pending = [event for event in self._pending if event.request_id != request_id]
        if bell := self._riders.get(request_id):
            bell.set()

    def _carrier(self) -> str | None:
        return next(iter(self._riders), None)

    def _wake_carrier(self) -> None:
        if self._pending and (carrier := self._carrier()) is not None:
            self._riders[carrier].set()

    def _pack(self) -> Parcel:
        parcel = Parcel(self._replica, self._channel, self._number, tuple(self._pending))
        self._number += 1
        self._pending.clear()
        for event in parcel.events:
            self._account(event)
        return parcel

    def _account(self, event: Event) -> None:
        left = self._unfinished.get(event.request_id, 0) - ended_choices(event)
        if isinstance(event, Failure) or left <= 0:
            self.close(event.request_id)
        else:
            self._unfinished[event.request_id] = left


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
    """The ingress's end of all streams from all replicas: order restored, events dealt out to the calls' mailboxes.

    Nothing is ever skipped: behind a parcel that is missing everything waits, and a request whose stream has ended
    without its last event is the caller's to fail. New requests then ride on a new channel, which counts afresh.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._epoch = 0
        self._mailboxes: dict[str, Mailbox] = {}
        self._sequences: dict[tuple[str, str], _Sequence] = {}
        self._served_by: dict[str, str] = {}  # request -> replica, once an event of it has come
        self._refused: dict[str, str] = {}  # request -> the replica that it was taken away from

    @property
    def channel(self) -> str:
        """What new requests name as their way back: an outbox of the replica belongs to one channel."""
        return f"{self._name}.{self._epoch}"

    def renew(self) -> None:
        """The channel has lost something; those who ride on it may finish, nobody else gets on."""
        self._epoch += 1

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
        for due in self._sequences.setdefault((parcel.replica, parcel.channel), _Sequence()).in_order(parcel):
            for event in due.events:
                self._deliver(due.replica, event)

    def fail(self, request_id: str, error: HalftoneError) -> None:
        if mailbox := self._mailboxes.get(request_id):
            mailbox.put(Failure(request_id, error))

    def _deliver(self, replica: str, event: Event) -> None:
        mailbox = self._mailboxes.get(event.request_id)
        if mailbox is None or self._refused.get(event.request_id) == replica:
            return
        self._served_by[event.request_id] = replica
        mailbox.put(event)


class _Sequence:
    """Parcels by number: one that comes early waits for those before it, one that comes twice is dropped."""

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, Parcel] = {}

    def in_order(self, parcel: Parcel) -> list[Parcel]:
        if parcel.number >= self._next:
            self._early[parcel.number] = parcel
        due = []
        while self._next in self._early:
            due.append(self._early.pop(self._next))
            self._next += 1
        return due


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
