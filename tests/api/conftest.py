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
    requests: Callable[[], int]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


def run_rim(settings: ApiSettings) -> Iterator[Rim]:
    backend = ScriptedBackend()
    server = uvicorn.Server(uvicorn.Config(create_app(backend, settings), log_level="critical", lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    started = threading.Event()

    async def serve() -> None:
        started.set()
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    yield Rim(f"http://127.0.0.1:{listener.getsockname()[1]}", backend, lambda: len(server.server_state.tasks))
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


@pytest.fixture(scope="session")
def _http(_rim: Rim) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=_rim.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def _openai(_rim: Rim) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{_rim.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(rim: Rim, _http: httpx.Client) -> httpx.Client:
    return _http


@pytest.fixture
def openai(rim: Rim, _openai: OpenAI) -> OpenAI:
    return _openai
