"""A replica that finds no kernels on disk serves on the plain path at once, and by the kernels once they are built."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from serve.generation import Delta, Event
from serve.heartbeat import ReplicaBeat
from serve.kernels import BEING_BUILT, background, build, build_aside, library, unavailable
from serve.replica import Replica
from tests.ingress import Ingress
from tests.test_replica import Beats, config, events, has_tokens, is_last, parcels, replica_of, request

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels: {unavailable()}")


class Compiler:
    """Stands where `c++` does. It waits for a word, then says that it failed or hands out what was compiled before."""

    def __init__(self, folder: Path, library_path: Path) -> None:
        self._gate = folder / "gate"
        self._pid = folder / "pid"
        self.path = folder / "compiler"
        self.path.write_text(
            f"#!/bin/sh\necho $$ > {self._pid}\nwhile [ ! -e {self._gate} ]; do sleep 0.02; done\n. {self._gate}\n"
            f'while [ "$1" != -o ]; do shift; done\ncp {library_path} "$2"\n'
        )
        self.path.chmod(0o755)

    def succeed(self) -> None:
        self._say(":")

    def fail(self) -> None:
        self._say("echo 'halftone.cpp: error: no such thing' >&2; exit 1")

    def _say(self, word: str) -> None:
        spoken = self._gate.with_suffix(".new")
        spoken.write_text(word + "\n")
        spoken.rename(self._gate)

    async def process(self) -> psutil.Process:
        async with asyncio.timeout(60):
            while not (self._pid.exists() and self._pid.read_text().strip()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return psutil.Process(int(self._pid.read_text()))


@pytest.fixture
def forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process has not looked for kernels yet, and there are none on disk."""

    def forget() -> None:
        library._loaded.cache_clear()
        library.team.cache_clear()
        library.postpone(None)
        background._running = None

    monkeypatch.setenv("HALFTONE_KERNEL_CACHE", str(tmp_path / "kernels"))
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Compiler:
    compiled = build.compiled()  # before it is forgotten
    assert isinstance(compiled, Path)
    request.getfixturevalue("forgotten")
    made = Compiler(tmp_path, compiled)
    monkeypatch.setenv("CXX", str(made.path))
    return made


@asynccontextmanager
async def opened(beats: Beats, recipe: str = "int8") -> AsyncIterator[Replica]:
    replica = replica_of(config(recipe=recipe), beats)
    await replica.open()
    yield replica
    await replica.close()


async def reported(beats: Beats, fits: Callable[[str], bool]) -> ReplicaBeat:
    """The first beat whose load report tells such a path."""
    async with asyncio.timeout(120):
        while True:
            for beat in beats.heard:
                if beat.report and fits(beat.report["path"]):
                    return beat
            await asyncio.sleep(0.02)


def tokens(heard: list[Event], name: str) -> list[int]:
    mine = [event for event in heard if isinstance(event, Delta) and event.request_id == name]
    return [token for event in mine for token in event.token_ids]


@pytest.mark.parametrize("recipe", ["bf16", "int8"])
async def test_it_serves_at_once_and_then_natively_while_what_runs_keeps_its_bytes(
    recipe: str, compiler: Compiler
) -> None:
    beats, ingress = Beats(), Ingress()
    await ingress.open()
    async with opened(beats, recipe) as replica:
        plain = await reported(beats, lambda path: path.startswith("plain path"))
        assert plain.state == "ready"
        assert plain.report is not None
        assert plain.report["path"] == f"plain path: {BEING_BUILT}"
        assert "int8 packed" not in plain.report["kernels"]
        expected = tokens(events(await parcels(replica, request("alone", max_tokens=200))), "alone")

        running = asyncio.create_task(replica.generate(request("running", max_tokens=200), ingress.channel))
        await ingress.until(has_tokens)
        compiler.succeed()
        native = await reported(beats, lambda path: path == "native path")
        assert native.report is not None
        assert recipe != "int8" or "int8 packed" in native.report["kernels"]
        after = tokens(events(await parcels(replica, request("after", max_tokens=40))), "after")
        assert len(after) == 40
        await asyncio.wait_for(running, 60)
        heard = await ingress.until(lambda heard: any(map(is_last, heard)))
        assert tokens(heard, "running") == expected

        async with asyncio.timeout(60):
            while replica._retiring:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        replica.check_health()
    await ingress.close()


async def test_an_abort_reaches_an_answer_that_ends_on_the_plain_path(compiler: Compiler) -> None:
    beats, ingress = Beats(), Ingress()
    await ingress.open()
    async with opened(beats) as replica:
        running = asyncio.create_task(replica.generate(request("running", max_tokens=900), ingress.channel))
        await ingress.until(has_tokens)
        assert replica._serving is not None
        plain = replica._serving.engine
        compiler.succeed()
        await reported(beats, lambda path: path == "native path")
        await replica.abort(["running"])
        await asyncio.wait_for(running, 60)
        async with asyncio.timeout(60):
            while plain.is_alive:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    await ingress.close()


async def test_a_build_that_fails_leaves_the_plain_path_serving_and_says_why(compiler: Compiler) -> None:
    beats = Beats()
    async with opened(beats) as replica:
        compiler.fail()
        told = await reported(beats, lambda path: "could not compile" in path)
        assert told.report is not None
        assert told.report["path"].startswith("plain path: ")
        assert "no such thing" in told.report["path"]
        assert len(tokens(events(await parcels(replica, request("a"))), "a")) == 4


async def test_without_a_compiler_it_serves_and_says_so(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    beats = Beats()
    async with opened(beats) as replica:
        await reported(beats, lambda path: path == "plain path: no C++ compiler found (install g++ or set CXX)")
        assert len(tokens(events(await parcels(replica, request("a"))), "a")) == 4


async def test_a_replica_that_closes_ends_its_compiler(compiler: Compiler) -> None:
    async with opened(Beats()):
        process = await compiler.process()
        assert process.nice() == 19
    assert await asyncio.to_thread(psutil.wait_procs, [process], 30) == ([process], [])
    assert not build.is_compiled()


async def test_kernels_on_disk_are_taken_at_once() -> None:
    assert build_aside() is None
    beats = Beats()
    async with opened(beats):
        first = await reported(beats, lambda path: True)
        assert first.report is not None
        assert first.report["path"] == "native path"


async def test_memory_that_was_given_back_comes_back_with_the_kernels(compiler: Compiler) -> None:
    beats = Beats()
    async with opened(beats) as replica:
        await reported(beats, lambda path: BEING_BUILT in path)
        beats.resident = False
        async with asyncio.timeout(60):
            while replica._state != "freed" or replica._serving:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        compiler.succeed()
        await asyncio.to_thread(replica._build.wait)  # type: ignore[union-attr]
        assert unavailable() == BEING_BUILT
        beats.resident = True
        await reported(beats, lambda path: path == "native path")
