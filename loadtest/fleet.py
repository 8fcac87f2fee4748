"""Starts the generator processes, gives each its share and one common time zero, and reads what they hand
over.

The parent reads and judges; the children send and stamp. So neither the progress display nor the parsing of
answers can delay a timestamp. A child that dies is reported and its share is missing, the others' results
stay.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from loadtest.errors import SettingsError, WorkerError
from loadtest.frames import Assignment, Failed, Finished, Health, Ready, Start, Stop, pack, unpack
from loadtest.record import Capture, Record, read
from loadtest.settings import Load, Settings

LEAD_S = 0.1
STOP_PATIENCE_S = 10.0


@dataclass(slots=True)
class Fleet:
    """The processes of one stage. `on_record` and `on_health` are called as results come in."""

    settings: Settings
    load: Load
    on_record: Callable[[Record], None]
    on_health: Callable[[Health], None]
    origin_s: float = 0.0
    problems: list[str] = field(default_factory=list)
    _children: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def run(self, stop: asyncio.Event) -> None:
        """Returns when every child has handed over everything; `stop` makes that soon."""
        try:
            await self._start()
            reading = [asyncio.create_task(self._read(child)) for child in self._children]
            stopping = asyncio.create_task(self._stop_when(stop))
            try:
                await asyncio.gather(*reading)
            finally:
                stopping.cancel()
        finally:
            await self._end()

    async def _start(self) -> None:
        count = self.settings.processes
        if self.load.concurrency is not None:
            count = min(count, self.load.concurrency)
        for process in range(count):
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "loadtest.worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # the terminal's Ctrl-C is for the parent
            )
            self._children.append(child)
            _tell(child, Assignment(self.settings, self.load, process, count))
        for child in self._children:
            await self._await_ready(child)
        self.origin_s = time.monotonic() + LEAD_S
        for child in self._children:
            _tell(child, Start(self.origin_s))

    async def _await_ready(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None
        answer = await unpack(child.stdout)
        if isinstance(answer, Failed):
            raise SettingsError(answer.message)
        if not isinstance(answer, Ready):
            raise WorkerError("a generator process ended before it was ready; its message is above")

    async def _read(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None
        received, finished = 0, None
        while (message := await unpack(child.stdout)) is not None:
            if isinstance(message, Capture):
                received += 1
                self.on_record(read(message, self.origin_s))
            elif isinstance(message, Health):
                self.on_health(message)
            elif isinstance(message, Finished):
                finished = message.emitted
        status = await child.wait()
        if finished != received or status != 0:
            self.problems.append(f"a generator process ended early, with status {status}; its share is incomplete")

    async def _stop_when(self, stop: asyncio.Event) -> None:
        await stop.wait()
        for child in self._children:
            _tell(child, Stop())
        await asyncio.sleep(STOP_PATIENCE_S)
        self._kill()

    def _kill(self) -> None:
        for child in self._children:
            if child.returncode is None:
                child.kill()

    async def _end(self) -> None:
        self._kill()
        for child in self._children:
            await child.wait()


def _tell(child: asyncio.subprocess.Process, message: object) -> None:
    assert child.stdin is not None
    if child.returncode is None and not child.stdin.is_closing():
        child.stdin.write(pack(message))
