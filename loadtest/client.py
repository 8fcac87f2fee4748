"""HTTP/1.1 for measuring: timestamps at the socket first, meaning later.

`data_received` stamps the bytes as the event loop hands them over and stores them; nothing is decoded while
requests are in flight. What the bytes say is read by `record`, in another process. A general client library
would put its own buffers and wake-ups between the socket and the clock; the parsing of HTTP itself is
llhttp's (`httptools`).

Redirects, proxies, compression and cookies are left out on purpose: a benchmark talks to the server itself.
"""

import asyncio
import ssl
import time
from array import array
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httptools

from loadtest import errors

CONNECT_TIMEOUT_S = 10.0
# Servers close idle connections after 2 s (gunicorn), 5 s (uvicorn) or more. Reusing one at that moment would
# look like a cut, and retrying would hide real cuts; so none that old is reused.
IDLE_LIMIT_S = 1.5


@dataclass(slots=True)
class Exchange:
    """One request and what came back, uninterpreted. Times are `time.monotonic`, in seconds.

    `times_s[k]` is when `lengths[k]` bytes of `body` arrived (after HTTP's own chunking is undone).
    """

    started_s: float
    connected_s: float | None = None
    sent_s: float | None = None
    ended_s: float | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    times_s: "array[float]" = field(default_factory=lambda: array("d"))
    lengths: "array[int]" = field(default_factory=lambda: array("L"))
    body: bytearray = field(default_factory=bytearray)
    error_kind: str | None = None
    error_detail: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A server's address and the request head that never changes."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None
    headers: dict[str, str]

    @classmethod
    def of(cls, url: str, path: str, headers: dict[str, str], ca: Path | None, insecure: bool) -> "Target":
        """`url` with or without a trailing `/v1`."""
        parts = urlsplit(url)
        assert parts.hostname
        base = parts.path.rstrip("/").removesuffix("/v1")
        tls = _tls(ca, insecure) if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        return cls(parts.hostname, port, base + path, tls, {"host": parts.netloc.rpartition("@")[2], **headers})

    def head(self, content_length: int, request_id: str) -> bytes:
        """The request line and headers of one request."""
        lines = [f"POST {self.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += ["content-type: application/json", f"x-request-id: {request_id}"]
        lines += [f"content-length: {content_length}", "", ""]
        return "\r\n".join(lines).encode("latin-1")


def _tls(ca: Path | None, insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca) if ca else None)
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Client:
    """Sends requests over as many connections as are in flight, keeping idle ones for the next."""

    def __init__(self, target: Target, timeout_s: float, keepalive: bool = True) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._keepalive = keepalive
        self._idle: deque[_Connection] = deque()

    async def post(self, body: bytes, request_id: str) -> Exchange:
        """Never raises for a failing server: the exchange says what failed. Cancelling it marks it interrupted."""
        exchange = Exchange(started_s=time.monotonic())
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = self._reuse() or await self._connect(exchange)
                await connection.send(self._target.head(len(body), request_id) + body, exchange)
        except errors.RequestError as error:
            exchange.error_kind, exchange.error_detail = error.kind, str(error)
        except TimeoutError:
            exchange.error_kind = errors.Kind.TIMEOUT
            exchange.error_detail = f"no complete answer in {self._timeout_s:g} s"
        except asyncio.CancelledError:
            exchange.error_kind = errors.Kind.INTERRUPTED
            exchange.error_detail = "stopped while in flight"
        exchange.ended_s = exchange.ended_s or time.monotonic()
        if connection is not None:
            self._put_back(connection, exchange)
        return exchange

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def _reuse(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_fresh():
                return connection
            connection.close()
        return None

    async def _connect(self, exchange: Exchange) -> "_Connection":
        target = self._target
        loop = asyncio.get_running_loop()
        opening = loop.create_connection(_Connection, target.host, target.port, ssl=target.tls)
        try:
            _, connection = await asyncio.wait_for(opening, CONNECT_TIMEOUT_S)
        except OSError as error:
            raise errors.from_connecting(error, target.host, target.port) from error
        exchange.connected_s = time.monotonic()
        return connection

    def _put_back(self, connection: "_Connection", exchange: Exchange) -> None:
        if self._keepalive and exchange.error_kind is None and connection.is_fresh():
            self._idle.append(connection)
        else:
            connection.close()


class _Connection(asyncio.Protocol):
    """One TCP connection, one exchange at a time. The `on_` methods are llhttp's callbacks."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._finished: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._now_s = 0.0
        self._idle_since_s = 0.0
        self._delimited = False
        self._reusable = True

    async def send(self, request: bytes, exchange: Exchange) -> None:
        """Returns when the answer is complete; raises RequestError where it cannot become so."""
        if self._transport is None:
            raise errors.RequestError(errors.Kind.CUT, "the server closed the connection before the request left")
        self._parser = httptools.HttpResponseParser(self)
        self._exchange = exchange
        self._delimited = False
        self._finished = asyncio.get_running_loop().create_future()
        exchange.sent_s = time.monotonic()
        self._transport.write(request)
        try:
            await self._finished
        finally:
            self._exchange = None
            self._idle_since_s = time.monotonic()

    def is_fresh(self) -> bool:
        """Whether another request may go out on it."""
        open_ = self._transport is not None and not self._transport.is_closing()
        return open_ and self._reusable and time.monotonic() - self._idle_since_s < IDLE_LIMIT_S

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without being a subclass
        self._idle_since_s = time.monotonic()

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        if self._exchange is None:  # bytes that no request asked for: never reuse what sent them
            self._reusable = False
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(errors.RequestError(errors.Kind.MALFORMED, f"not HTTP: {error!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._finished is None or self._finished.done():
            return
        exchange = self._exchange
        if exchange is not None and exchange.status is not None and not self._delimited and error is None:
            self._now_s = time.monotonic()
            self.on_message_complete()  # a body without a length ends with its connection
        else:
            self._fail(errors.RequestError(errors.Kind.CUT, _how_cut(exchange, error)))

    # what llhttp calls

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._exchange is not None
        key = name.decode("latin-1").lower()
        self._exchange.headers[key] = value.decode("latin-1")
        self._delimited |= key in ("content-length", "transfer-encoding")

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._exchange.times_s.append(self._now_s)
            self._exchange.lengths.append(len(body))
            self._exchange.body += body

    def on_message_complete(self) -> None:
        assert self._exchange is not None
        assert self._finished is not None
        if self._exchange.status is not None and self._exchange.status < 200:  # the real answer is yet to come
            self._exchange.status = None
            return
        self._exchange.ended_s = self._now_s
        self._reusable = self._parser.should_keep_alive()
        if not self._finished.done():
            self._finished.set_result(None)

    def _fail(self, error: errors.RequestError) -> None:
        self._reusable = False
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(error)


def _how_cut(exchange: Exchange | None, error: Exception | None) -> str:
    reason = f" ({error})" if error else ""
    if exchange is not None and exchange.status is not None:
        return f"the server closed the connection in the middle of the answer{reason}"
    reused = exchange is not None and exchange.connected_s is None
    hint = "; it was a reused one, --no-keepalive rules out that it was closing already" if reused else ""
    return f"the server closed the connection before any answer{reason}{hint}"
