"""The page as a person meets it: headless Chromium in front of a server with nothing behind it."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import uvicorn

from serve.api import ApiSettings, Keys
from serve.api.app import create_app
from tests.dashboard.stage import Stage

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")

# A machine that runs more than this test is slow at times.
playwright.expect.set_options(timeout=20_000)

_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@dataclass
class Server:
    url: str
    stage: Stage
    loop: asyncio.AbstractEventLoop

    @contextmanager
    def held(self, from_token: int) -> Iterator[None]:
        """Inside, no answer gets past so many tokens."""
        gate = self.stage.gate = asyncio.Event()
        self.stage.gate_from = from_token
        try:
            yield
        finally:
            self.loop.call_soon_threadsafe(gate.set)


@contextmanager
def serving(settings: ApiSettings) -> Iterator[Server]:
    """On a free port, in a thread of its own."""
    stage = Stage()
    app = create_app(stage, settings, stage.rollouts)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(sockets=[listener]),))
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", stage, loop)
        finally:
            server.should_exit = True
            thread.join()
            loop.close()


@pytest.fixture(scope="session")
def _open() -> Iterator[Server]:
    with serving(ApiSettings()) as server:
        yield server


@pytest.fixture(scope="session")
def _locked() -> Iterator[Server]:
    with serving(ApiSettings(keys=Keys.of(["sk-api"], admin="sk-admin"))) as server:
        yield server


@pytest.fixture
def server(_open: Server) -> Server:
    _open.stage.reset()
    return _open


@pytest.fixture
def locked(_locked: Server) -> Server:
    """It answers `sk-api`, and `sk-admin` alone changes anything."""
    _locked.stage.reset()
    return _locked


# One per module and no longer: while Playwright's own event loop runs, no other test could start one.
@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console said, and errors that nobody caught. A test that expects one clears it."""
    return []


@pytest.fixture
def page(browser: playwright.Browser, complaints: list[str]) -> Iterator[playwright.Page]:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        assert complaints == []
