"""An ingress of a few lines, without HTTP: it listens for tokens and keeps what came."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve.generation import Event
from serve.hop import Parcel
from serve.wire import Channel, Terminal


class Ingress:
    """`open` before its channel is named to anybody."""

    def __init__(self) -> None:
        self.heard: list[Parcel] = []
        self.terminal = Terminal(self.heard.append)

    async def open(self) -> Channel:
        self.channel = await self.terminal.open("127.0.0.1")
        return self.channel

    async def close(self) -> None:
        await self.terminal.close()

    @property
    def events(self) -> list[Event]:
        return [event for parcel in self.heard for event in parcel.events]

    async def until(self, is_enough: Callable[[list[Event]], bool]) -> list[Event]:
        async with asyncio.timeout(60):
            while not is_enough(self.events):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return self.events
