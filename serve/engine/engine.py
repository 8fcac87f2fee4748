"""The engine: requests in, events out, and between them one thread that makes step after step.

It knows neither HTTP nor Ray nor metrics: it takes token ids, calls `sink` once per step with every event of the step,
and tells facts. Text becomes token ids in `prompt`, before a request comes here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from serve.engine.core import EngineCore
from serve.engine.head import Head
from serve.engine.intake import check
from serve.engine.settings import EngineSettings
from serve.engine.stats import EngineStats
from serve.engine.witness import Witness
from serve.errors import Overloaded, VariantUnavailable
from serve.generation import Event, GenerationRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Engine", "EngineStats", "Sink"]

_logger = logging.getLogger(__name__)

Sink = Callable[[list[Event]], None]


class Engine:
    """Serves one model. `submit`, `abort`, `stats` may be called from any thread; `sink` is called from the engine's.

    Raises UnsupportedArchitecture for a model that it would serve wrong and ConfigError for settings that cannot hold.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: EngineSettings, sink: Sink) -> None:
        self._core = EngineCore(model, tokenizer, settings)
        self.settings = self._core.settings
        """As asked for, with every "auto" filled in."""
        self.path = self._core.path
        """Which path makes the steps, for the load report: native, or plain and why."""
        self._sink = sink
        self._wake = threading.Condition()
        """Guards what follows: the only state that two threads share."""
        self._inbox: deque[tuple[GenerationRequest, float, Witness | None]] = deque()
        self._aborts: deque[str] = deque()
        self._closing = False
        self._draining = False
        self._thread = threading.Thread(target=self._loop, name="halftone-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False once its thread has ended, of itself or by `close`."""
        return self._thread.is_alive()

    @property
    def head(self) -> Head | None:
        """The output head, for whoever turns hidden states into logits on the engine's thread."""
        return self._core.head

    def submit(self, request: GenerationRequest, witness: Witness | None = None) -> None:
        """Queue a request whose prompt is token ids; `witness` looks on while its first choice is computed.

        Raises InvalidRequest, ContextLengthExceeded, Overloaded or VariantUnavailable; what is accepted always ends in
        a delta with a finish reason for each choice, or in one `Failure`.
        """
        check(request, self._core.vocabulary_size, self.settings)
        with self._wake:
            if self._closing:
                raise VariantUnavailable("the engine is shutting down; try again shortly", retry_after_s=1.0)
            waiting = self._core.num_waiting + self._num_submitted()
            if waiting + request.n > self.settings.max_queue:
                raise Overloaded(
                    f"{waiting} sequences wait already; the queue holds {self.settings.max_queue}", retry_after_s=1.0
                )
            self._inbox.append((request, time.perf_counter(), witness))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request before the next step; unknown and finished ones are ignored."""
        with self._wake:
            self._aborts.append(request_id)
            self._wake.notify()

    def stats(self) -> EngineStats:
        """Counts as of the last step."""
        stats = self._core.stats()
        with self._wake:
            return replace(stats, waiting=stats.waiting + self._num_submitted())

    def kv_cache_resident_bytes(self) -> int:
        """What of the KV cache was written to, and is held. Walks its pages: milliseconds per gigabyte."""
        return self._core.kv_cache_resident_bytes()

    def close(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """Stop: with `drain` what was accepted is finished first, otherwise it ends in a `Failure`. Joins the thread.

        A drain that takes longer than `timeout_s` is cut short.
        """
        with self._wake:
            self._closing, self._draining = True, drain
            self._wake.notify()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_s if drain else None)
        if self._thread.is_alive():
            self.close(drain=False)

    def _num_submitted(self) -> int:
        return sum(request.n for request, _, _ in self._inbox)

    # The engine's own thread

    def _loop(self) -> None:
        if threads := self._core.torch_threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            while self._wait():
                self._deliver(self._take_in() + self._core.step())
        reason = VariantUnavailable("the engine shut down before the answer was finished", retry_after_s=1.0)
        self._deliver(self._take_in() + self._core.fail_all(reason))

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the engine must end."""
        with self._wake:
            while not (self._closing or self._inbox or self._aborts or not self._core.is_idle):
                self._wake.wait()
            return not self._closing or (self._draining and bool(self._inbox or not self._core.is_idle))

    def _take_in(self) -> list[Event]:
        """Admit what was submitted, then end what was aborted: an abort may overtake no submission."""
        with self._wake:
            submitted, aborted = list(self._inbox), list(self._aborts)
            self._inbox.clear()
            self._aborts.clear()
        events = [event for entry in submitted for event in self._core.accept(*entry)]
        return events + [event for request_id in aborted for event in self._core.abort(request_id)]

    def _deliver(self, events: list[Event]) -> None:
        if not events:
            return
        try:
            self._sink(events)
        except Exception:
            _logger.exception("the sink refused %d events", len(events))
