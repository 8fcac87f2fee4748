"""A client that goes away is noticed at once, at every stage of its call."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, MutableMapping
from typing import Any

import httpx
import pytest

from serve.api import ApiSettings, Limits
from serve.api.app import create_app
from serve.api.feed import ClientGone, Feed, while_connected
from serve.errors import Overloaded
from serve.generation import Delta, Disclosure, Event, PromptDelta
from tests.api.conftest import Rim
from tests.api.scripted import ScriptedBackend, story


def post(rim: Rim, stream: bool) -> socket.socket:
    body = json.dumps({"model": "tale", "prompt": "Hi", "stream": stream}).encode()
    client = socket.create_connection(("127.0.0.1", rim.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def wait_until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came true")


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_tokens_come_cancels_the_answer(rim: Rim, stream: bool) -> None:
    rim.backend.pause = asyncio.Event()
    client = post(rim, stream)
    if stream:
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    wait_until(lambda: rim.backend.calls)
    assert rim.backend.cancelled == []
    client.close()
    wait_until(lambda: rim.backend.cancelled)
    wait_until(lambda: rim.requests() == 0)
    assert rim.backend.cancelled == rim.backend.calls


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_before_a_variant_is_found_cancels_the_start(rim: Rim, stream: bool) -> None:
    rim.backend.before_start = asyncio.Event()
    client = post(rim, stream)
    wait_until(lambda: rim.backend.calls)
    client.close()
    wait_until(lambda: rim.backend.cancelled)
    wait_until(lambda: rim.requests() == 0)


def test_a_finished_answer_is_not_cancelled(rim: Rim, http: httpx.Client) -> None:
    for stream in (True, False):
        http.post("/v1/completions", json={"model": "tale", "prompt": "Hi", "stream": stream})
    wait_until(lambda: rim.requests() == 0)
    assert rim.backend.cancelled == []


class Scripted:
    """An answer that yields what it is given, then waits for ever or raises."""

    disclosure = Disclosure("bf16", "bf16", "weighted", "f")

    def __init__(self, events: list[Event], then: BaseException | None) -> None:
        self.cancels = 0
        self.sent = 0
        self._events = events
        self._then = then

    async def events(self) -> AsyncIterator[Event]:
        for event in self._events:
            self.sent += 1
            yield event
        if self._then is None:
            await asyncio.Event().wait()
        else:
            raise self._then

    async def cancel(self) -> None:
        self.cancels += 1


def some(count: int) -> list[Event]:
    return [PromptDelta("r", (1,)), *(Delta("r", 0, "x", (1,)) for _ in range(count - 1))]


async def test_a_batch_is_all_that_is_ready_and_an_error_comes_after_it() -> None:
    answer = Scripted(some(5), Overloaded("full"))
    async with Feed(answer) as feed:
        assert await feed.batch() == some(5)
        with pytest.raises(Overloaded):
            await feed.batch()
    assert answer.cancels == 1


async def test_reading_ahead_is_bounded() -> None:
    answer = Scripted(some(5000), None)
    async with Feed(answer) as feed:
        for _ in range(5):
            await asyncio.sleep(0)
        assert answer.sent == 1024
        assert len(await feed.batch()) == 1024
        assert len(await feed.batch()) == 1024
    assert answer.cancels == 1


def asgi(backend: ScriptedBackend, limits: Limits, send: Any) -> Awaitable[None]:
    """One streamed call to the app itself, without a server between."""
    body = json.dumps({"model": "tale", "prompt": "Hi", "stream": True}).encode()
    arriving = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> MutableMapping[str, Any]:
        return arriving.pop() if arriving else await Connection().receive()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    return create_app(backend, ApiSettings(limits=limits))(scope, receive, send)


async def test_a_client_that_reads_nothing_counts_as_gone() -> None:
    backend = ScriptedBackend()

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    backend.pause = asyncio.Event()
    backend.pause.set()
    backend.script = lambda request: [*story(request)[:3], Overloaded("never reached")]
    await asgi(backend, Limits(write_timeout_s=0.01), send)
    assert backend.cancelled == backend.calls


async def test_a_slow_engine_is_not_a_slow_client() -> None:
    backend = ScriptedBackend()
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    backend.pause = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, backend.pause.set)
    await asgi(backend, Limits(write_timeout_s=0.01), send)
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert backend.cancelled == []


async def test_an_engine_step_of_many_tokens_is_one_write() -> None:
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await asgi(ScriptedBackend(), Limits(), send)
    assert len(sent) == 4  # the start, the tokens, [DONE], the end


class Connection:
    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> MutableMapping[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def test_the_block_is_left_when_the_client_goes() -> None:
    connection = Connection()

    async def block() -> None:
        async with while_connected(connection.receive):
            connection.gone.set()
            await asyncio.Event().wait()

    with pytest.raises(ClientGone):
        await block()


async def test_a_client_that_goes_as_the_block_ends_disturbs_nothing() -> None:
    connection = Connection()
    async with while_connected(connection.receive):
        connection.gone.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]


async def test_a_cancellation_from_outside_stays_one() -> None:
    async def block() -> None:
        async with while_connected(Connection().receive):
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
