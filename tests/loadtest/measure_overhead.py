"""What the load generator itself adds to the gaps between tokens. By hand: `python tests/loadtest/measure_overhead.py`.

A server that, like an inference engine, writes one token to each of 64 streams at every step notes when it wrote
each; the generator is bound to one core, the server to another. The table shows p99 of the gaps as written and as
measured, for rising numbers of tokens a second. `--realtime` puts server and worker before a busy machine's others.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

STREAMS = 64
STEPS_PER_S = (31.25, 125.0, 500.0, 1000.0, 2000.0)
SECONDS = 4.0
ROOT = Path(__file__).parent.parent.parent

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(**fields: object) -> bytes:
    about = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1, "model": "fake"}
    return chunk(b"data: " + json.dumps(about | fields).encode() + b"\n\n")


TOKEN = event(choices=[{"index": 0, "delta": {"content": " token"}, "finish_reason": None}])
DONE = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Stream(asyncio.Protocol):
    """One connection; joins the batch with each request."""

    def __init__(self, batch: dict["Stream", list[float]]) -> None:
        self._batch = batch

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(HEAD)
        self._batch[self] = []


async def serve(steps_per_s: float, tokens: int) -> None:
    batch: dict[Stream, list[float]] = {}
    gaps: list[float] = []
    server = await asyncio.get_running_loop().create_server(lambda: Stream(batch), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    stopping = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    usage = event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": tokens})
    due_s = time.monotonic()
    while not stopping.done():
        due_s = max(due_s + 1 / steps_per_s, time.monotonic() - 0.01)
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        for stream, written in list(batch.items()):
            written.append(time.monotonic())
            stream.transport.write(TOKEN)
            if len(written) == tokens:
                stream.transport.write(usage + DONE)
                gaps += [later - earlier for earlier, later in pairwise(written)]
                del batch[stream]
    print(json.dumps({"p50": float(np.quantile(gaps, 0.5)), "p99": float(np.quantile(gaps, 0.99))}))


def measure(steps_per_s: float, cores: list[int], realtime: bool) -> None:
    tokens = max(20, int(steps_per_s * 2))
    command = [sys.executable, __file__, "serve", str(steps_per_s), str(tokens)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=lambda: os.sched_setaffinity(0, cores[1:] or cores)) as server:
        port = int(server.stdout.readline())
        run = [sys.executable, "-m", "loadtest", "run", "--url", f"http://127.0.0.1:{port}", "--model", "fake"]
        run += ["--concurrency", str(STREAMS), "--duration", str(SECONDS), "--warmup", "1s", "--json", "--quiet"]
        with subprocess.Popen(
            run, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=lambda: os.sched_setaffinity(0, cores[:1])
        ) as generator:
            if realtime:
                put_first(server.pid, *children_of(generator))
            stdout = generator.communicate()[0]
        written = json.loads(server.communicate()[0].splitlines()[-1])
    result = json.loads(stdout)
    overall, generator = result["overall"], result["generator"]
    seen = overall["itl_s"]
    print(
        f"{overall['tokens_per_s']:9.0f} | {written['p50'] * 1e3:7.2f} {seen['p50'] * 1e3:7.2f} |"
        f" {written['p99'] * 1e3:7.2f} {seen['p99'] * 1e3:7.2f} {(seen['p99'] - written['p99']) * 1e3:+7.2f} |"
        f" {generator['loop_lag_s']['p99'] * 1e3:6.2f} | {generator['cpu_ratio']:6.1%} |"
        f" {'; '.join(generator['reasons']) or '–'}",
        flush=True,
    )


def children_of(process: subprocess.Popen[str]) -> list[int]:
    """Waits for the generator's worker to start."""
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (children := tasks.read_text().split()):
        time.sleep(0.01)
    return [int(child) for child in children]


def put_first(*processes: int) -> None:
    """As if nobody else used the machine: server and worker go before other programs. Needs to be root."""
    for process in processes:
        os.sched_setscheduler(process, os.SCHED_FIFO, os.sched_param(1))


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    print("tokens/s  | p50 written, seen | p99 written, seen, added | lag p99 | CPU | was it the bottleneck? (ms)")
    for steps_per_s in STEPS_PER_S:
        measure(steps_per_s, cores, "--realtime" in sys.argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(float(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
