"""Sending an answer piece by piece as server-sent events. Knows ASGI and patience; the pieces come ready-made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.feed import ClientGone

__all__ = ["EventStream"]


class EventStream(Response):
    """Server-sent events: one ASGI message per piece, and a client that reads nothing for too long counts as gone."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], headers: Mapping[str, str], write_timeout_s: float) -> None:
        self._pieces = pieces
        self._write_timeout_s = write_timeout_s
        self._writing = False
        self._written = 0
        self.status_code = 200
        self.background = None
        self.init_headers({**headers, "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with asyncio.timeout(None) as patience:
            watch = asyncio.create_task(self._watch(patience))
            try:
                async with aclosing(self._pieces) as pieces:
                    async for piece in pieces:
                        await self._send(send, {"type": "http.response.body", "body": piece, "more_body": True})
                await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
            except asyncio.CancelledError:
                if patience.expired():
                    raise ClientGone from None
                raise
            finally:
                watch.cancel()

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        self._writing = True
        try:
            await send(message)
        except OSError:
            raise ClientGone from None
        self._writing = False
        self._written += 1

    async def _watch(self, patience: asyncio.Timeout) -> None:
        """Looks up now and then: a timeout around each write would cost as much as the write itself."""
        stuck = False
        while not stuck:
            before = self._written if self._writing else None
            await asyncio.sleep(self._write_timeout_s)
            stuck = self._writing and self._written == before
        patience.reschedule(asyncio.get_running_loop().time())
