"""The rim as clients meet it: a real server on a free port, in a thread of its own, over a scripted backend."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from openai import OpenAI

from serve.api import ApiSettings
from serve.api.app import create_app
from tests.api.scripted import ScriptedBackend


@dataclass
class Rim:
    url: str
    backend: ScriptedBackend
    loop: asyncio.AbstractEventLoop
    requests: Callable[[], int]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def event(self) -> asyncio.Event:
        """For the server's loop; set it with `release`."""
        return asyncio.Event()

    def release(self, event: asyncio.Event) -> None:
        self.loop.call_soon_threadsafe(event.set)


def run_rim(settings: ApiSettings) -> Iterator[Rim]:
    backend = ScriptedBackend()
    server = uvicorn.Server(uvicorn.Config(create_app(backend, settings), log_level="critical", lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        started.set()
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    yield Rim(
        f"http://127.0.0.1:{listener.getsockname()[1]}", backend, loops[0], lambda: len(server.server_state.tasks)
    )
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="session")
def _rim() -> Iterator[Rim]:
    yield from run_rim(ApiSettings())


@pytest.fixture
def rim(_rim: Rim) -> Rim:
    _rim.backend.reset()
    return _rim


@pytest.fixture
def http(rim: Rim) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=rim.url, timeout=30) as client:
        yield client


@pytest.fixture
def openai(rim: Rim) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{rim.url}/v1", api_key="none", max_retries=0) as client:
        yield client
