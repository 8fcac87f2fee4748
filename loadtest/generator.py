"""Sends one process's share of a load, on one event loop, and hands over each exchange as it ends.

The open loop's clock never looks at the server: the next request leaves when it is due, whatever is still in
flight. Where it left late (no connection, too many in flight, a busy generator) it still counts from when it
was due.
"""

import asyncio
import itertools
import os
import random
import time
from array import array
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from loadtest import arrivals, errors
from loadtest.arrivals import Arrival
from loadtest.client import Client, Exchange, Target
from loadtest.errors import SettingsError
from loadtest.frames import Assignment, Health
from loadtest.record import Capture, answer_text
from loadtest.settings import Load, Settings
from loadtest.workload import Conversation, Workload

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
NOBODY_THERE = (errors.Kind.CONNECT, errors.Kind.DNS, errors.Kind.TLS)
PAUSE_AFTER_REFUSAL_S = 0.1
TICK_S = 0.01
TRY_LATER = (429, 503)


def schedule(settings: Settings, load: Load) -> Iterator[Arrival]:
    """Every arrival of an open loop, warm-up first, the same in every process."""
    planned = _traced(settings) if settings.trace else _timed(settings, load)
    if load.total_requests is not None:
        planned = itertools.islice(planned, load.total_requests)
    if load.total_s is not None:
        end_s = load.total_s
        planned = itertools.takewhile(lambda arrival: arrival.at_s < end_s, planned)
    return planned


def _traced(settings: Settings) -> Iterator[Arrival]:
    assert settings.trace is not None
    return iter(arrivals.read_trace(settings.trace, settings.trace_speed))


def _timed(settings: Settings, load: Load) -> Iterator[Arrival]:
    assert load.rate_per_s is not None
    rng = random.Random(f"{settings.seed}:arrivals:{load.first_index}")
    base = 1.0 if load.last_rate_per_s else load.rate_per_s
    times = {
        "constant": lambda: arrivals.constant(base),
        "poisson": lambda: arrivals.poisson(base, rng),
        "bursty": lambda: arrivals.gamma(base, settings.burstiness, rng),
    }[settings.arrivals]()
    if load.last_rate_per_s:
        assert load.total_s is not None
        times = arrivals.ramp(load.rate_per_s, load.last_rate_per_s, load.total_s, times)
    return (Arrival(index, at_s) for index, at_s in enumerate(times, load.first_index))


def target_of(settings: Settings) -> Target:
    """Where requests go; SettingsError where the key's variable is not set or the CA cannot be read."""
    headers = dict(settings.headers)
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env)
        if not key:
            raise SettingsError(f"api_key_env: the environment has no {settings.api_key_env}")
        headers["authorization"] = f"Bearer {key}"
    try:
        return Target.of(settings.url, PATHS[settings.api], headers, settings.ca, settings.insecure)
    except OSError as error:
        raise SettingsError(f"ca: {settings.ca}: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class _Due:
    """One request of a conversation, and when it is due on the monotonic clock."""

    index: int
    turn: int
    at_s: float
    warmup: bool


class Generator:
    """One process's share of one stage. `emit` gets every request exactly once, finished, failed or interrupted."""

    def __init__(self, assignment: Assignment, emit: Callable[[Capture], None]) -> None:
        settings = assignment.settings
        self._assignment = assignment
        self._settings = settings
        self._load = assignment.load
        self._hand_over = emit
        self.emitted = 0
        self._workload = Workload(settings)
        self._client = Client(target_of(settings), settings.timeout, settings.keepalive)
        self._places = asyncio.Semaphore(max(1, settings.max_in_flight // assignment.processes))
        self._tasks: set[asyncio.Task[None]] = set()
        self._all_ended = asyncio.Event()
        self._bug: BaseException | None = None
        self._origin_s = 0.0
        self._stopping = False
        self._sent = 0
        self._in_flight = 0
        self._lags_s = array("d")
        self._cpu_mark = (0.0, 0.0)

    async def run(self, origin_s: float) -> None:
        """Returns once all is sent and answered, or stopped; everything in flight was handed over then."""
        self._origin_s = origin_s
        self._cpu_mark = (time.process_time(), time.monotonic())
        ticker = asyncio.create_task(self._tick())
        self._start(self._send_open() if self._load.is_open else self._send_closed())
        await self._all_ended.wait()
        ticker.cancel()
        self._client.close()
        if self._bug is not None:
            raise self._bug

    def stop(self) -> None:
        """Sends nothing more and gives up what is in flight."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()

    def health(self) -> Health:
        """How it kept up since the last call."""
        now = (time.process_time(), time.monotonic())
        cpu_s, wall_s = (later - earlier for later, earlier in zip(now, self._cpu_mark, strict=True))
        self._cpu_mark = now
        lags_s, self._lags_s = self._lags_s, array("d")
        return Health(self._assignment.process, self._sent, self._in_flight, cpu_s, wall_s, lags_s)

    def _emit(self, capture: Capture) -> None:
        self.emitted += 1
        self._hand_over(capture)

    # how fast

    async def _send_open(self) -> None:
        share = itertools.islice(
            schedule(self._settings, self._load), self._assignment.process, None, self._assignment.processes
        )
        for position, arrival in enumerate(share):
            conversation = self._workload.conversation(arrival)
            due_s = self._origin_s + arrival.at_s
            await _sleep_until(due_s)
            number = position * self._assignment.processes + self._assignment.process
            warmup = number < self._load.warmup_requests or arrival.at_s < self._load.warmup_s
            self._start(self._converse(conversation, _Due(arrival.index, 0, due_s, warmup)))

    async def _send_closed(self) -> None:
        assert self._load.concurrency is not None
        await _sleep_until(self._origin_s)
        numbers: Iterator[int] = itertools.count(self._assignment.process, self._assignment.processes)
        if self._load.total_requests is not None:
            numbers = itertools.takewhile(lambda number: number < (self._load.total_requests or 0), numbers)
        clients = range(self._assignment.process, self._load.concurrency, self._assignment.processes)
        for _ in clients:
            self._start(self._client_loop(numbers))

    async def _client_loop(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            due_s = time.monotonic()
            at_s = due_s - self._origin_s
            if self._load.total_s is not None and at_s >= self._load.total_s:
                return
            warmup = number < self._load.warmup_requests or at_s < self._load.warmup_s
            index = self._load.first_index + number
            conversation = self._workload.conversation(Arrival(index, at_s))
            error_kind = await self._converse(conversation, _Due(index, 0, due_s, warmup))
            if self._stopping:
                return
            if error_kind in NOBODY_THERE:
                await asyncio.sleep(PAUSE_AFTER_REFUSAL_S)
            if self._settings.think_time:
                await asyncio.sleep(self._settings.think_time)

    # one conversation

    async def _converse(self, conversation: Conversation, due: _Due) -> str | None:
        """Plays all turns; a later turn is due when the answer before it is there and the think time is over."""
        answers: list[str] = []
        while True:
            capture = await self._request(self._workload.body(conversation, answers), due)
            exchange = capture.exchange
            self._emit(capture)
            over = len(answers) + 1 == len(conversation.turns) or exchange.status != 200 or self._stopping
            if over or exchange.error_kind is not None:
                return exchange.error_kind
            assert exchange.ended_s is not None
            answers.append(answer_text(exchange))
            due = _Due(due.index, due.turn + 1, exchange.ended_s + self._settings.think_time, due.warmup)
            await _sleep_until(due.at_s)

    async def _request(self, body: bytes, due: _Due) -> Capture:
        """Sends until answered, or until `retries` times of being told to come later are used up."""
        self._sent += 1
        self._in_flight += 1
        attempts = 0
        retry_after_s: float | None = None
        exchange = Exchange(started_s=due.at_s)
        try:
            async with self._places:
                while True:
                    attempts += 1
                    request_id = f"{self._settings.seed}-{due.index}-{due.turn}-{attempts}"
                    exchange = await self._client.post(body, request_id)
                    retry_after_s = _retry_after(exchange) if exchange.status in TRY_LATER else retry_after_s
                    if exchange.status not in TRY_LATER or attempts > self._settings.retries or self._stopping:
                        break
                    await asyncio.sleep(1.0 if retry_after_s is None else retry_after_s)
        except asyncio.CancelledError:  # while waiting for a place or for a Retry-After
            exchange.error_kind = errors.Kind.INTERRUPTED
            exchange.error_detail = "stopped before it was sent"
            exchange.ended_s = time.monotonic()
        finally:
            self._in_flight -= 1
        return Capture(
            index=due.index,
            turn=due.turn,
            scheduled_s=due.at_s - self._origin_s,
            warmup=due.warmup,
            attempts=attempts,
            process=self._assignment.process,
            streamed=self._settings.stream,
            exchange=exchange,
            retry_after_s=retry_after_s,
        )

    # itself

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        if self._stopping:
            work.close()
            return
        task = asyncio.create_task(_swallow_cancel(work))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if (error := task.exception()) is not None:  # a bug of ours must not pass for a quiet server
            self._bug = error
            self.stop()
        if not self._tasks:
            self._all_ended.set()

    async def _tick(self) -> None:
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + TICK_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            self._lags_s.append(max(0.0, time.monotonic() - due_s))


async def _sleep_until(due_s: float) -> None:
    """Never early: an event loop may round a timer down, and a request sent before it is due would look too fast."""
    await asyncio.sleep(due_s - time.monotonic())
    while (left_s := due_s - time.monotonic()) > 0:  # noqa: ASYNC110 - the clock is what it waits for
        await asyncio.sleep(left_s)


async def _swallow_cancel(work: Coroutine[Any, Any, object]) -> None:
    """`stop` cancels tasks between requests too, where there is nothing to hand over."""
    try:
        await work
    except asyncio.CancelledError:
        return


def _retry_after(exchange: Exchange) -> float | None:
    """Seconds, or a date, as RFC 9110 (10.2.3) allows; None where the server gave neither."""
    value = exchange.headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
