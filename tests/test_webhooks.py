"""Webhooks arrive signed, again and again until they are taken, and only where the configuration says."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve import webhooks as webhooks_module
from serve.config import parse_config
from serve.errors import ConfigError
from serve.office import News
from serve.rollout import Entry
from serve.rollout.settings import Webhook
from serve.webhooks import Webhooks

SECRET = "a shared secret"


class Receiver:
    """A real HTTP server of a few lines; answers with the statuses of its script, then with 204."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.arrived = asyncio.Event()

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/hook"

    async def close(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def wait(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.got) < count:
                self.arrived.clear()
                await self.arrived.wait()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        self.got.append((headers, await reader.readexactly(int(headers["content-length"]))))
        status = self.script.pop(0) if self.script else 204
        writer.write(
            f"HTTP/1.1 {status} x\r\nlocation: /else\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()
        )
        writer.close()
        self.arrived.set()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    yield made
    await made.close()


def news(to: str = "succeeded", kind: Any = "transition") -> News:
    facts = {"from": "promoting", "to": to, "weight": 100.0}
    return News("r3", "bf16", "int8", Entry(kind, 12.5, "int8 is the stable variant now", facts))


async def test_a_transition_arrives_signed_and_again_until_it_is_taken(receiver: Receiver) -> None:
    hooks = Webhooks("m", [Webhook(await receiver.open(), SECRET)], clock=lambda: 1790000000.0, first_wait_s=0.01)
    hooks.open()
    receiver.script = [500, 302, 429]  # a redirect is not followed, it is a failure
    hooks.announce(news(kind="verdict"))
    hooks.announce(news())
    await receiver.wait(4)
    deliveries = {headers["x-halftone-delivery"] for headers, _ in receiver.got}
    assert deliveries == {"r3-12.500-succeeded"}
    headers, body = receiver.got[-1]
    expected = hmac.new(SECRET.encode(), b"1790000000." + body, hashlib.sha256).hexdigest()
    assert headers["x-halftone-signature"] == f"sha256={expected}"
    told = json.loads(body)
    assert (told["rollout"], told["from"], told["to"], told["model"]) == ("r3", "promoting", "succeeded", "m")
    hooks.announce(news("rolled_back"))
    await receiver.wait(5)
    await hooks.close()


async def test_a_dead_address_delays_nobody_and_its_queue_is_bounded(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhooks_module, "_KEPT", 4)
    dead = Webhook("http://127.0.0.1:9/", SECRET)
    hooks = Webhooks("m", [dead, Webhook(await receiver.open(), SECRET)], first_wait_s=60.0)
    hooks.open()
    for _ in range(4):
        hooks.announce(news())
    await receiver.wait(4)
    for _ in range(4):
        hooks.announce(news())
    await receiver.wait(8)
    assert "is not announced" in caplog.text
    await hooks.close()


def test_only_what_the_configuration_lists_is_called_and_its_secret_is_never_shown() -> None:
    document: dict[str, Any] = {
        "model": {"name": "m", "source": "builtin:storyteller"},
        "variants": [{"name": "a", "recipe": "bf16"}],
        "rollouts": {"webhooks": [{"url": "https://ops.example/hook", "secret": SECRET}]},
    }
    assert SECRET not in repr(parse_config(document))
    document["rollouts"]["webhooks"][0]["secret"] = "short"
    with pytest.raises(ConfigError, match=r"rollouts\.webhooks\[0\]\.secret") as refused:
        parse_config(document)
    assert "short" not in refused.value.message.replace("too short", "").replace("shorter", "")
    document["rollouts"]["webhooks"][0] = {"url": "file:///etc/passwd", "secret": SECRET}
    with pytest.raises(ConfigError, match=r"rollouts\.webhooks\[0\]\.url"):
        parse_config(document)
