"""An OpenAI-compatible server with known delays, in its own process, that writes down what it really did.

    python fake_server.py [--tls CERTIFICATE KEY] [--behave JSON]     prints its port, serves until its input closes

A request says in its field `fake` how it wants to be treated (see `Behaviour`), or else `--behave` does. `GET
/truth?run=NAME` returns, for each request of that run, when its last byte was read and when each chunk was written,
on the machine's monotonic clock, which the load generator shares. `GET /metrics?run=NAME` says it as Prometheus would.
"""

import argparse
import asyncio
import json
import random
import ssl
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Behaviour:
    """How to treat one request. Delays are seconds, or {"lognormal": [median, sigma]}."""

    run: str = ""
    ttft: Any = 0.0
    gap: Any = 0.0
    tokens: int = 5
    tokens_per_chunk: int = 1
    usage: bool = True
    miscount: int = 0
    stall_at: float | None = None  # seconds after the run's first request, for everybody
    stall_for: float = 2.0
    slots: int | None = None  # requests served at one time
    variants: list[str] = field(default_factory=list)
    status: int = 200
    status_times: int = 10**9  # how many first attempts of a request get that status
    retry_after: str | None = None
    cut_after: int | None = None  # chunks
    malformed: str | None = None  # json | sse | http | unfinished | error
    early_hints: bool = False
    each: list[dict[str, Any]] = field(default_factory=list)  # in turn, one for each request
    until_close: bool = False  # no length and no chunks: the answer ends with its connection


@dataclass
class Truth:
    """What happened to one request."""

    request_id: str
    received_s: float
    body: dict[str, Any]
    written_s: list[float] = field(default_factory=list)
    ended_s: float | None = None


class Run:
    """State that the requests of one run share."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.truths: list[Truth] = []
        self.slots: asyncio.Semaphore | None = None
        self.rejected = 0


DEFAULTS: dict[str, Any] = {}
RUNS: dict[str, Run] = defaultdict(Run)


def draw(delay: Any, rng: random.Random) -> float:
    if isinstance(delay, dict):
        median, sigma = delay["lognormal"]
        return float(median * pow(2.718281828, rng.gauss(0.0, sigma)))
    return float(delay)


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while await exchange(reader, writer):
            pass
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """One request and its answer; whether the connection may be used again."""
    first = await reader.readexactly(1)
    if not first.isalpha():  # not HTTP: a TLS handshake, most likely
        plain(writer, 400, "{}")
        return False
    head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    if method == "GET":
        name = parse_qs(urlsplit(path).query).get("run", [""])[0]
        truths = RUNS[name].truths if name in RUNS else []
        is_metrics = urlsplit(path).path == "/metrics"
        plain(writer, 200, metrics(truths) if is_metrics else json.dumps([asdict(truth) for truth in truths]))
        return True
    body = json.loads(content)
    behaviour = Behaviour(**{**DEFAULTS, **body.pop("fake", {})})
    run = RUNS[behaviour.run]
    if behaviour.each:
        behaviour = replace(behaviour, **behaviour.each[len(run.truths) % len(behaviour.each)])
    truth = Truth(headers.get("x-request-id", ""), time.monotonic(), body)
    run.truths.append(truth)
    if behaviour.slots and run.slots is None:
        run.slots = asyncio.Semaphore(behaviour.slots)
    if run.slots is None:
        return await answer(writer, behaviour, run, truth)
    async with run.slots:
        return await answer(writer, behaviour, run, truth)


async def answer(writer: asyncio.StreamWriter, behaviour: Behaviour, run: Run, truth: Truth) -> bool:
    number = len(run.truths)
    rng = random.Random(f"{behaviour.run}:{number}")
    attempt = int(truth.request_id.rpartition("-")[2] or 1) if behaviour.status != 200 else 1
    if behaviour.status != 200 and attempt <= behaviour.status_times:
        extra = {"retry-after": behaviour.retry_after} if behaviour.retry_after else {}
        plain(writer, behaviour.status, json.dumps({"error": {"message": "not now"}}), extra)
        truth.ended_s = time.monotonic()
        return True
    if behaviour.malformed == "http":
        writer.write(b"this is no HTTP\r\n\r\n")
        return False
    if behaviour.early_hints:
        writer.write(start(103, {"link": "</style.css>"}))
    variants = behaviour.variants or [""]
    variant = variants[number % len(variants)]
    named = {"x-halftone-variant": variant, "x-halftone-precision": variant, "x-halftone-route": "weighted"}
    if truth.body.get("stream"):
        return await stream(writer, behaviour, run, truth, rng, named if variant else {})
    await wait(draw(behaviour.ttft, rng) + behaviour.tokens * draw(behaviour.gap, rng), behaviour, run)
    if behaviour.until_close:
        writer.write(start(200, {"connection": "close"}) + json.dumps(whole(behaviour, truth)).encode())
        return False
    plain(writer, 200, json.dumps(whole(behaviour, truth)), named if variant else {})
    truth.ended_s = time.monotonic()
    return True


async def stream(
    writer: asyncio.StreamWriter,
    behaviour: Behaviour,
    run: Run,
    truth: Truth,
    rng: random.Random,
    headers: dict[str, str],
) -> bool:
    writer.write(start(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked", **headers}))
    send(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    due_s = time.monotonic() + draw(behaviour.ttft, rng)
    for number in range(0, behaviour.tokens, behaviour.tokens_per_chunk):
        await wait(due_s - time.monotonic(), behaviour, run)
        if behaviour.cut_after is not None and number >= behaviour.cut_after:
            writer.transport.abort()
            return False
        if behaviour.malformed and number:
            malform(writer, behaviour.malformed)
            return True
        words = "".join(f" w{number + offset}" for offset in range(behaviour.tokens_per_chunk))
        truth.written_s.append(time.monotonic())
        send(writer, {"choices": [{"index": 0, "delta": {"content": words}}]})
        due_s = max(due_s, time.monotonic() - 0.001) + draw(behaviour.gap, rng)
    send(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    if behaviour.usage:
        send(writer, {"choices": [], "usage": usage(behaviour)})
    truth.ended_s = time.monotonic()
    writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    await writer.drain()
    return True


def malform(writer: asyncio.StreamWriter, how: str) -> None:
    kinds = {
        "json": b"data: {half a thing\n\n",
        "sse": b"Traceback (most recent call last)\n\n",
        "unfinished": b"",
        "error": b'data: {"error": {"message": "out of memory"}}\n\n',
    }
    if kinds[how]:
        writer.write(chunk(kinds[how]))
    writer.write(b"0\r\n\r\n")


async def wait(delay_s: float, behaviour: Behaviour, run: Run) -> None:
    """Sleeps, and through the stall if it falls into it: then nobody is served, whoever they are."""
    await asyncio.sleep(max(0.0, delay_s))
    if behaviour.stall_at is None:
        return
    into_s = time.monotonic() - (run.began_s + behaviour.stall_at)
    if 0 <= into_s < behaviour.stall_for:
        await asyncio.sleep(behaviour.stall_for - into_s)


def metrics(truths: list[Truth]) -> str:
    """The truths as Prometheus histograms, named as vLLM names them, in two label sets."""
    edges = [0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0]
    done = [truth for truth in truths if truth.ended_s is not None and truth.written_s]
    values = {
        "time_to_first_token_seconds": [[t.written_s[0] - t.received_s] for t in done],
        "inter_token_latency_seconds": [[b - a for a, b in pairwise(t.written_s)] for t in done],
        "e2e_request_latency_seconds": [[(t.ended_s or 0) - t.received_s] for t in done],
        "request_queue_time_seconds": [[0.001] for _ in done],
    }
    lines = []
    for name, per_request in values.items():
        lines.append(f"# TYPE fake_{name} histogram")
        for part in (0, 1):
            flat = [value for each in per_request[part::2] for value in each]
            for edge in [*edges, float("inf")]:
                count = sum(value <= edge for value in flat)
                shown = "+Inf" if edge == float("inf") else str(edge)
                lines.append(f'fake_{name}_bucket{{part="{part}",le="{shown}"}} {count}')
            lines.append(f'fake_{name}_sum{{part="{part}"}} {sum(flat)}')
            lines.append(f'fake_{name}_count{{part="{part}"}} {len(flat)}')
    return "\n".join(lines) + "\n"


def usage(behaviour: Behaviour) -> dict[str, int]:
    count = behaviour.tokens + behaviour.miscount
    return {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}


def whole(behaviour: Behaviour, truth: Truth) -> dict[str, Any]:
    text = "".join(f" w{number}" for number in range(behaviour.tokens))
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
    choice |= {"message": {"content": text}} if "messages" in truth.body else {"text": text}
    return {"choices": [choice], "usage": usage(behaviour)}


def start(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


def plain(writer: asyncio.StreamWriter, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    data = text.encode()
    about = {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
    writer.write(start(status, about) + data)


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def send(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    writer.write(chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))


async def main(tls: ssl.SSLContext | None) -> None:
    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--tls", nargs=2, metavar=("CERTIFICATE", "KEY"))
    options.add_argument("--behave", type=json.loads, default={})
    given = options.parse_args()
    DEFAULTS.update(given.behave)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if given.tls else None
    if context is not None:
        context.load_cert_chain(*given.tls)
    asyncio.run(main(context))
