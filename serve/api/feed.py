"""The events of one answer, in batches: whoever reads gets all that is ready, in one go.

One small task per answer reads ahead, bounded; when its reader leaves before the end, the answer is cancelled. That is
the whole of the contract with a client that disconnects: leaving the block frees what the answer held.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self

from serve.api.backend import Answer
from serve.generation import Delta, Failure, PromptDelta

__all__ = ["ClientGone", "Feed", "while_connected"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_MAX_READY: Final = 1024
"""Events read ahead of a slow reader."""


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class Feed:
    """`async with Feed(answer) as feed`, then `await feed.batch()` until it is empty."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._ready: list[PromptDelta | Delta] = []
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._task = asyncio.create_task(self._read())

    async def batch(self) -> list[PromptDelta | Delta]:
        """All events that are ready, at least one; empty once the answer has ended. Raises what the answer raised,
        and the error of a `Failure`, after the events before it."""
        while not self._ready and not self._task.done():
            self._changed.clear()
            await self._changed.wait()
        if not self._ready:
            self._task.result()
        batch, self._ready = self._ready, []
        self._room.set()
        return batch

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = self._task.done() and not self._task.cancelled() and self._task.exception() is None
        self._task.cancel()
        if not ended:
            await asyncio.shield(asyncio.create_task(self._answer.cancel()))
        await asyncio.wait({self._task})

    async def _read(self) -> None:
        try:
            async for event in self._answer.events():
                if isinstance(event, Failure):
                    raise event.error
                self._ready.append(event)
                self._changed.set()
                if len(self._ready) >= _MAX_READY:
                    self._room.clear()
                    await self._room.wait()
        finally:
            self._changed.set()


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Run the block until the client goes away, which cancels it and raises `ClientGone`; as `asyncio.timeout` does.

    The request's body must have been read: what comes next from the client is then its leaving.
    """
    task = asyncio.current_task()
    assert task is not None
    inside, gone = True, False

    def leave(done: asyncio.Task[None]) -> None:
        nonlocal gone
        if inside and not done.cancelled():
            gone = True
            task.cancel()

    watcher = asyncio.create_task(_gone(receive))
    watcher.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        inside = False
        watcher.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
