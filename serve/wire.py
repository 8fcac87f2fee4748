"""The connection that tokens take from a replica to an ingress: opened once, by the replica, and kept.

An ingress listens on a port of its machine's address within the cluster and names it, with a secret, in every request.
A replica that has something to say connects there, shows the secret and sends its parcels one after the other. Nothing
is sent the other way. TCP keeps the order and pushes back; what breaks the connection fails the requests that rely on
it, and the next request connects anew.

Nothing that arrives is run (`serve.parcels`). In a cluster whose processes speak TLS to one another, so do these.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from serve.errors import GenerationFailed, HalftoneError, VariantUnavailable
from serve.hop import Outbox, Parcel
from serve.parcels import ParcelReader, pack

__all__ = ["Channel", "Lines", "Terminal"]

_LOG = logging.getLogger(__name__)
_SECRET_BYTES = 32
_CONNECT_S = 10.0
_SHOW_S = 10.0


@dataclass(frozen=True, slots=True)
class Channel:
    """The way back to one ingress, as a request names it."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class Terminal:
    """The ingress's end: what comes from any replica goes to `accept`. For one event loop."""

    def __init__(self, accept: Callable[[Parcel], None]) -> None:
        self._accept = accept
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._server: asyncio.Server | None = None
        self._connections = _Connections()

    async def open(self, host: str) -> Channel:
        """Listen on a free port of `host`."""
        tls = _tls(ssl.Purpose.CLIENT_AUTH)
        self._server = await asyncio.get_running_loop().create_server(
            self._incoming, host, 0, ssl=tls, ssl_handshake_timeout=_SHOW_S if tls else None
        )
        return Channel(host, self._server.sockets[0].getsockname()[1], self._secret)

    async def close(self) -> None:
        if self._server:
            self._server.close()
        await self._connections.close()

    def _incoming(self) -> _Incoming:
        return _Incoming(self._connections, self._secret, self._accept)


class Lines:
    """The replica's ends: one connection and one outbox per ingress. For one event loop."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._outboxes: dict[Channel, Outbox] = {}
        self._dialling: set[asyncio.Task[None]] = set()
        self._connections = _Connections()

    def outbox(self, channel: Channel) -> Outbox:
        """The one that leads there; connected at its first use."""
        if (outbox := self._outboxes.get(channel)) is None:
            outbox = self._outboxes[channel] = Outbox(self._replica)
            task = asyncio.get_running_loop().create_task(self._dial(channel, outbox))
            self._dialling.add(task)
            task.add_done_callback(self._dialling.discard)
        return outbox

    async def close(self) -> None:
        """What is still open fails."""
        for task in self._dialling:
            task.cancel()
        await asyncio.gather(*self._dialling, return_exceptions=True)
        await self._connections.close()
        for channel, outbox in list(self._outboxes.items()):
            self._lost(channel, outbox, GenerationFailed("the replica ended before it could answer"))

    async def _dial(self, channel: Channel, outbox: Outbox) -> None:
        line = partial(_Line, self._connections, channel.secret, outbox, partial(self._lost, channel, outbox))
        try:
            async with asyncio.timeout(_CONNECT_S):
                loop, tls = asyncio.get_running_loop(), _tls(ssl.Purpose.SERVER_AUTH)
                await loop.create_connection(line, channel.host, channel.port, ssl=tls)
        except (OSError, TimeoutError) as error:
            _LOG.warning("no connection to the ingress at %s:%d: %s", channel.host, channel.port, error)
            refused = VariantUnavailable(f"the replica cannot reach {channel.host}:{channel.port} to answer there")
            self._lost(channel, outbox, refused)

    def _lost(self, channel: Channel, outbox: Outbox, error: HalftoneError) -> None:
        self._outboxes.pop(channel, None)
        outbox.fail(error)


class _Connections:
    """Those of one process, which end together."""

    def __init__(self) -> None:
        self._standing: set[_End] = set()
        self._closed = False

    def add(self, end: _End) -> None:
        self._standing.add(end)
        if self._closed:  # it was under way
            end.abort()

    def discard(self, end: _End) -> None:
        self._standing.discard(end)

    async def close(self) -> None:
        self._closed = True
        ends = list(self._standing)
        for end in ends:
            end.abort()
        await asyncio.gather(*(end.lost.wait() for end in ends))


class _End(asyncio.Protocol):
    """One end of a connection."""

    def __init__(self, connections: _Connections) -> None:
        self._connections = connections
        self.lost = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self.lost.set()

    def abort(self) -> None:
        self._transport.abort()


class _Incoming(_End):
    """The ingress's: nothing is taken before the secret has come."""

    def __init__(self, connections: _Connections, secret: bytes, accept: Callable[[Parcel], None]) -> None:
        super().__init__(connections)
        self._secret = secret
        self._accept = accept
        self._shown: bytes | None = b""  # of the secret; None once it was right
        self._reader = ParcelReader()

    def connection_made(self, transport: Any) -> None:
        self._patience = asyncio.get_running_loop().call_later(_SHOW_S, transport.abort)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._shown is not None:
            self._shown += data
            if len(self._shown) < _SECRET_BYTES:
                return
            shown, data, self._shown = self._shown[:_SECRET_BYTES], self._shown[_SECRET_BYTES:], None
            if not hmac.compare_digest(shown, self._secret):
                _LOG.warning("a connection to the port for tokens did not know its secret, and was closed")
                self.abort()
                return
            self._patience.cancel()
        for parcel in self._reader.feed(data):  # asyncio closes a connection that brings what is none
            self._accept(parcel)


class _Line(_End):
    """The replica's: what the outbox sends goes out at once, unless the way is full."""

    def __init__(
        self, connections: _Connections, secret: bytes, outbox: Outbox, on_lost: Callable[[HalftoneError], None]
    ) -> None:
        super().__init__(connections)
        self._secret = secret
        self._outbox = outbox
        self._on_lost = on_lost

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.write(self._secret)
        self.resume_writing()

    def pause_writing(self) -> None:
        self._outbox.shut()

    def resume_writing(self) -> None:
        self._outbox.lead(self._send)

    def connection_lost(self, exc: Exception | None) -> None:
        self._outbox.shut()
        self._on_lost(GenerationFailed("the connection that carried the answer broke"))
        super().connection_lost(exc)

    def _send(self, parcel: Parcel) -> None:
        self._transport.write(pack(parcel))


def _tls(purpose: ssl.Purpose) -> ssl.SSLContext | None:
    """The cluster's own certificates, where Ray is told to use them between its processes."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    context = ssl.create_default_context(purpose, cafile=os.environ["RAY_TLS_CA_CERT"])
    context.check_hostname = False  # they are the cluster's, not a machine's
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    return context
