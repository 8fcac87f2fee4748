"""The API's port, opened by the ingress process itself: one uvicorn server on the event loop that already runs.

Why not through Serve's proxy: measured on two cores a request costs 0.7 ms here and 5.7 ms there, and the proxy answers
`/-/routes` and `/-/healthz` on the same port, which must not leave loopback. Signals stay with the process's owner.

What never becomes a request is refused here, before any route: a head that is too large or too slow, and bytes that are
not HTTP. The answers have OpenAI's shape like all others.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["Listener"]

_KEEP_ALIVE_S = 75
_BACKLOG = 2048
_HEAD_BYTES = 64 * 1024
_HEAD_S = 30.0
_LINGER_S = 1.0


class _Protocol(HttpToolsProtocol):
    """One connection, whose request heads are bounded in size and time."""

    _head_bytes = 0
    _head_is_open = True
    _is_refused = False
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its parent has it
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_HEAD_S, self._on_slow_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        went_on = self._head_is_open  # a head that begins in this data is counted from the next on
        super().data_received(data)
        if not self._head_is_open or self._is_refused:
            return
        self._head_bytes += len(data) if went_on else 0
        if self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_S, self._on_slow_head)
        if self._head_bytes > _HEAD_BYTES:
            self._refuse(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the request's head may hold at most {_HEAD_BYTES} bytes"
            )

    def on_message_begin(self) -> None:
        self._head_is_open, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_is_open = False
        self._stop_clock()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, "these bytes are not an HTTP request")

    def _on_slow_head(self) -> None:
        self._deadline = None
        if self._head_bytes:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request's head did not arrive within {_HEAD_S:g} s")
        else:
            self.transport.close()

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # What is still on its way is read and dropped: closing on it would reset the connection under our answer.
        self._is_refused = True
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: an actor's process is ended by Ray, not by the terminal."""
        yield


class Listener:
    """One ASGI app on one address. `open` returns once it accepts; a port in use raises OSError.

    shared: several processes of this user listen there, and the system deals connections to them.
    """

    def __init__(self, app: Any, *, host: str, port: int, shared: bool = False) -> None:
        self._address = (host, port)
        self._shared = shared
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        listening = _listen(*self._address, shared=self._shared)
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listening]))
        while not self._server.started:
            await asyncio.sleep(0.01)
            if self._task.done():
                self._task.result()

    async def close(self, timeout_s: float) -> None:
        """Stop accepting, give open answers `timeout_s` to finish, then close their connections. Idempotent."""
        if self._task is None:
            return
        self._server.config.timeout_graceful_shutdown = max(1, round(timeout_s))
        self._server.force_exit = timeout_s <= 0
        self._server.should_exit = True
        await self._task


def _listen(host: str, port: int, *, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    listening.setblocking(False)
    return listening
