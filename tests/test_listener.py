"""The port answers, refuses what is no request, and closes when told. A bare ASGI app stands behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve import listener as listener_module
from serve.listener import Listener
from tests.running import free_port


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body; `/slow` takes its time."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": str(length).encode()})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    chosen = free_port()
    listener = Listener(app, host="127.0.0.1", port=chosen)
    await listener.open()
    yield chosen
    await listener.close(0.0)


async def talk(port: int, data: bytes) -> tuple[str, dict[str, Any]]:
    """Status line and JSON error of what answers to raw bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for start in range(0, len(data), 1 << 16):
            writer.write(data[start : start + (1 << 16)])
            await asyncio.sleep(0)
        answer = await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), json.loads(body)["error"]


async def test_requests_are_answered_one_after_another_on_one_connection(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for size in (0, 10, 300_000, 5):
            answer = await client.post("/", content=b"x" * size)
            assert (answer.status_code, answer.text) == (200, str(size))
        assert "server" not in answer.headers


async def test_a_head_of_a_megabyte_is_a_431_before_any_route(port: int) -> None:
    status, error = await talk(port, b"GET / HTTP/1.1\r\nhost: x\r\nx-big: " + b"a" * 10**6)
    assert status == "HTTP/1.1 431 Request Header Fields Too Large"
    assert error["type"] == "invalid_request_error"


async def test_a_body_may_be_larger_than_a_head(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\nconnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + b"x" * 200_000)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert b"\r\n200000\r\n" in answer


async def test_bytes_that_are_no_request_are_a_400_in_the_same_shape(port: int) -> None:
    status, error = await talk(port, b"\x16\x03\x01 not http\r\n\r\n")
    assert status == "HTTP/1.1 400 Bad Request"
    assert "HTTP" in error["message"]


async def test_a_head_that_never_ends_is_given_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_HEAD_S", 0.05)
    status, _ = await talk(port, b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: a")
    assert status == "HTTP/1.1 408 Request Timeout"


async def test_a_connection_that_says_nothing_is_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_HEAD_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_closing_lets_an_open_answer_finish_and_takes_no_more() -> None:
    port = free_port()
    listener = Listener(app, host="127.0.0.1", port=port)
    await listener.open()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        slow = asyncio.create_task(client.get("/slow"))
        await asyncio.sleep(0.1)
        await listener.close(10.0)
        assert (await slow).text == "0"
        with pytest.raises(httpx.ConnectError):
            await client.get("/")
    await listener.close(0.0)


async def test_a_port_that_is_taken_is_an_error(port: int) -> None:
    with pytest.raises(OSError, match="in use"):
        await Listener(app, host="127.0.0.1", port=port).open()
