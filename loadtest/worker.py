"""One generator process: `python -m loadtest.worker`, started by `fleet`, talking over its standard streams.

It ends by itself when its parent is gone, and leaves Ctrl-C to the parent, which then asks it to stop.
"""

import asyncio
import gc
import os
import sys

from loadtest.errors import LoadTestError
from loadtest.event_loop import new_event_loop, raise_descriptor_limit
from loadtest.frames import Assignment, Failed, Finished, Ready, Start, Stop, pack, unpack
from loadtest.generator import Generator

HEALTH_EVERY_S = 0.5


def main() -> None:
    """Runs one assignment to its end."""
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not land among the frames
    raise_descriptor_limit()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(results))


async def _serve(results: int) -> None:
    orders = await _orders()
    output, written = await _output(results)
    assignment: Assignment = await unpack(orders)
    try:
        generator = Generator(assignment, emit=lambda capture: _tell(output, capture))
    except LoadTestError as error:
        _tell(output, Failed(str(error)))
    else:
        _tell(output, Ready())
        start = await unpack(orders)
        if isinstance(start, Start):
            gc.collect()
            gc.freeze()  # what is loaded now stays: the collector need not walk it while timestamps are taken
            await _run(generator, start, orders, output)
    output.close()
    await written


async def _run(
    generator: Generator, start: Start, orders: asyncio.StreamReader, output: asyncio.WriteTransport
) -> None:
    watch = asyncio.create_task(_stop_when_told(generator, orders))
    pulse = asyncio.create_task(_report_health(generator, output))
    await generator.run(start.origin_s)
    watch.cancel()
    pulse.cancel()
    _tell(output, generator.health())
    _tell(output, Finished(generator.emitted))


async def _stop_when_told(generator: Generator, orders: asyncio.StreamReader) -> None:
    order = await unpack(orders)
    assert order is None or isinstance(order, Stop)  # None: the parent is gone
    generator.stop()


async def _report_health(generator: Generator, output: asyncio.WriteTransport) -> None:
    while True:
        await asyncio.sleep(HEALTH_EVERY_S)
        _tell(output, generator.health())


def _tell(output: asyncio.WriteTransport, message: object) -> None:
    if not output.is_closing():  # it is when the parent is gone, and then nobody asks
        output.write(pack(message))


async def _orders() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _output(results: int) -> tuple[asyncio.WriteTransport, asyncio.Future[None]]:
    """Where frames go, and a future that is done when all of them went, after `close`."""
    loop = asyncio.get_running_loop()
    written = loop.create_future()
    transport, _ = await loop.connect_write_pipe(lambda: _Ending(written), os.fdopen(results, "wb", buffering=0))
    return transport, written


class _Ending(asyncio.Protocol):
    """Tells when the pipe is closed, which is after everything was written."""

    def __init__(self, written: asyncio.Future[None]) -> None:
        self._written = written

    def connection_lost(self, error: Exception | None) -> None:
        self._written.set_result(None)


if __name__ == "__main__":
    main()
