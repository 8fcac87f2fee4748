"""Transitions of rollouts, announced to the addresses that the configuration lists and to no others.

Each is one POST of JSON with an HMAC-SHA256 of time and body, so that the receiver knows who wrote it and when:

    x-halftone-timestamp: 1790000000
    x-halftone-signature: sha256=hex(HMAC(secret, timestamp + "." + body))
    x-halftone-delivery: r3-1790000000.123-succeeded    (the same in every retry)

What is not answered with a 2xx is sent again, later and later, for some minutes. One queue and one task per address, so
that a dead one delays nobody; a queue that is full drops its oldest. No redirect is followed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import httpx

from serve.office import News
from serve.rollout.settings import Webhook

__all__ = ["Webhooks", "signature"]

_LOG = logging.getLogger(__name__)
_TIMEOUT_S: Final = 10.0
_ATTEMPTS: Final = 8
_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 60.0
_KEPT: Final = 256


class Webhooks:
    """`open`, then `announce` as often as there is news, then `close`. One event loop."""

    def __init__(
        self,
        model_name: str,
        hooks: Sequence[Webhook],
        *,
        clock: Callable[[], float] = time.time,
        first_wait_s: float = _FIRST_WAIT_S,
    ) -> None:
        self._model_name = model_name
        self._clock = clock
        self._first_wait_s = first_wait_s
        self._queues = {hook: asyncio.Queue[dict[str, Any]](_KEPT) for hook in hooks}
        self._tasks: list[asyncio.Task[None]] = []

    def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._deliver_for_ever(hook, queue)) for hook, queue in self._queues.items()]

    async def close(self) -> None:
        """What is still waiting is not sent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def announce(self, news: News) -> None:
        """Returns at once. Only transitions are announced."""
        if news.entry.kind != "transition":
            return
        for hook, queue in self._queues.items():
            if queue.full():
                dropped = queue.get_nowait()
                _LOG.warning("webhook %s is too slow: %s is not announced", hook.url, dropped["delivery"])
            queue.put_nowait(self._body(news))

    def _body(self, news: News) -> dict[str, Any]:
        entry = news.entry
        return {
            "delivery": f"{news.rollout}-{entry.at_s:.3f}-{entry.facts['to']}",
            "event": "rollout.transition",
            "model": self._model_name,
            "rollout": news.rollout,
            "stable": news.stable,
            "canary": news.canary,
            "from": entry.facts["from"],
            "to": entry.facts["to"],
            "weight": entry.facts["weight"],
            "at_s": entry.at_s,
            "sentence": entry.sentence,
        }

    async def _deliver_for_ever(self, hook: Webhook, queue: asyncio.Queue[dict[str, Any]]) -> None:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False) as client:
            while True:
                await self._deliver(client, hook, await queue.get())

    async def _deliver(self, client: httpx.AsyncClient, hook: Webhook, body: dict[str, Any]) -> None:
        told = "never asked"
        for attempt in range(_ATTEMPTS):
            if attempt:
                wait_s = min(_LONGEST_WAIT_S, self._first_wait_s * 2.0 ** (attempt - 1))
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311  spreads retries, guards nothing
            try:
                answer = await self._post(client, hook, body)
            except httpx.HTTPError as error:
                told = str(error) or type(error).__name__
                continue
            if answer.is_success:
                return
            told = f"status {answer.status_code}"
        _LOG.warning("webhook %s did not take %s after %d attempts: %s", hook.url, body["delivery"], _ATTEMPTS, told)

    async def _post(self, client: httpx.AsyncClient, hook: Webhook, body: dict[str, Any]) -> httpx.Response:
        content, timestamp = json.dumps(body).encode(), str(int(self._clock()))
        headers = {
            "content-type": "application/json",
            "x-halftone-delivery": body["delivery"],
            "x-halftone-timestamp": timestamp,
            "x-halftone-signature": f"sha256={signature(hook.secret, timestamp, content)}",
        }
        return await client.post(hook.url, content=content, headers=headers)


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """Hexadecimal; compare in constant time (`hmac.compare_digest`)."""
    return hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
