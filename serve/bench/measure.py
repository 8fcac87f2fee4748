"""Times the engine from where its caller stands: tokens as they come out of the sink, over the wall clock.

Prefill is a prompt's tokens over the time to its first output token. Decode is counted while every sequence of the
batch is decoding: from the step that gave the last of them its first token to the step in which the first one ends, so
neither prefill nor a batch that runs empty is in it. A batch enters the engine at once: its thread is held in the sink
until all requests are queued, or a small model would be through with the first before the last is submitted.
Speed on a machine with other work on it means little.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import torch

from serve.bench.result import Bench, BenchSettings, Phase, Speed
from serve.compression.calibration import Calibration
from serve.compression.recipe import Recipe
from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings
from serve.errors import SetupError
from serve.fresh_process import Progress
from serve.generation import Delta, Event, Failure, GenerationRequest, SamplingParams
from serve.loading import LoadedModel, load

__all__ = ["measure"]

_STATUS = Path("/proc/self/status")


def measure(
    source: str,
    recipe: Recipe,
    settings: BenchSettings,
    progress: Progress,
    *,
    device: str = "auto",
    calibration: Calibration | None = None,
    artifacts: Path | None = None,
) -> Bench:
    """Load, warm up, time. Meant for a process that does nothing else, or its memory figures mean nothing."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    start = time.perf_counter()
    loaded = load(source, recipe, device=device, calibration=calibration, artifacts=artifacts, progress=progress)
    with _serving(loaded, settings) as served:
        served.batch(1, max_tokens=1)
        ready_s = time.perf_counter() - start
        speed = _speeds(served, settings, progress)
        return _result(loaded, served.engine, ready_s, speed)


def _speeds(served: _Served, settings: BenchSettings, progress: Progress) -> tuple[Speed, ...]:
    jobs: list[tuple[Phase, int]] = [("prefill", 1), *(("decode", size) for size in settings.batch_sizes)]
    speeds, runs = [], 1 + settings.repeats
    for done, (phase, batch_size) in enumerate(jobs):
        rates = []
        for repeat in range(runs):
            progress(f"{phase} {batch_size}", done * runs + repeat, len(jobs) * runs)
            rates.append(served.prefill_rate() if phase == "prefill" else served.decode_rate(batch_size))
        speeds.append(Speed(phase, batch_size, statistics.median(rates[1:]), tuple(rates[1:])))
    return tuple(speeds)


@dataclass(frozen=True)
class _Step:
    """Tokens per request that came out together, at `at_s` on the monotonic clock, and who ended with them."""

    at_s: float
    tokens: dict[str, int]
    ended: frozenset[str]


class _Served:
    """An engine with its sink, one batch at a time."""

    def __init__(self, loaded: LoadedModel, settings: BenchSettings) -> None:
        if settings.tokens > loaded.context_length:
            raise SetupError(
                f"{settings.prompt_tokens} prompt and {settings.decode_tokens} output tokens do not fit this model's "
                f"context of {loaded.context_length}; lower --prompt-tokens or --decode-tokens"
            )
        self._settings = settings
        self._vocabulary_size = int(loaded.config.get_text_config().vocab_size)
        self._random = random.Random(settings.seed)  # noqa: S311
        self._steps: SimpleQueue[_Step | Failure] = SimpleQueue()
        self._gate = threading.Event()
        self._holder = ""
        """The request in whose step the engine's thread waits for the gate. No other may: the step before it is told
        before its thread comes here, and would wait for a batch that waits for it."""
        self._requests = 0
        self.engine = Engine(loaded.model, loaded.tokenizer, _limits(settings, loaded), self._on_step)

    def prefill_rate(self) -> float:
        """Prompt tokens per second of one prompt alone."""
        start_s, steps = self.batch(1, max_tokens=1)
        return self._settings.prompt_tokens / (steps[0].at_s - start_s)

    def decode_rate(self, batch_size: int) -> float:
        """Output tokens per second while all sequences of the batch decode."""
        _, steps = self.batch(batch_size, self._settings.decode_tokens)
        return decode_rate(steps, batch_size)

    def batch(self, size: int, max_tokens: int) -> tuple[float, list[_Step]]:
        """Serve `size` random prompts to their end; when it began, and every step that gave tokens."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        requests = [GenerationRequest(self._name(), self._prompt(), params) for _ in range(size)]
        with self._held():
            for request in requests:
                self.engine.submit(request)
            start_s = time.perf_counter()
        open_requests = {request.request_id for request in requests}
        steps: list[_Step] = []
        while open_requests:
            step = self._steps.get()
            if isinstance(step, Failure):
                raise step.error
            steps.append(step)
            open_requests -= step.ended
        return start_s, steps

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The engine's thread waits in the sink, with a request of one token, until the block ends."""
        self._gate.clear()
        self._holder = self._name()
        try:
            self.engine.submit(GenerationRequest(self._holder, (0,), SamplingParams(max_tokens=1, ignore_eos=True)))
            step = self._steps.get()
            if isinstance(step, Failure):
                raise step.error
            yield
        finally:
            self._gate.set()

    def _name(self) -> str:
        self._requests += 1
        return str(self._requests)

    def _prompt(self) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._vocabulary_size) for _ in range(self._settings.prompt_tokens))

    def _on_step(self, events: list[Event]) -> None:
        """On the engine's thread."""
        at_s, tokens, ended = time.perf_counter(), dict[str, int](), set[str]()
        for event in events:
            if isinstance(event, Failure):
                self._steps.put(event)
            elif isinstance(event, Delta):
                tokens[event.request_id] = tokens.get(event.request_id, 0) + len(event.token_ids)
                if event.finish_reason is not None:
                    ended.add(event.request_id)
        if tokens:
            self._steps.put(_Step(at_s, tokens, frozenset(ended)))
        if self._holder in tokens:
            self._gate.wait()


def decode_rate(steps: Sequence[_Step], batch_size: int) -> float:
    """Tokens per second between the step that completes the batch and the first that ends a sequence."""
    seen: set[str] = set()
    window: list[_Step] = []
    for step in steps:
        seen |= step.tokens.keys()
        if len(seen) == batch_size:
            window.append(step)
        if step.ended:
            break
    if len(window) < 2:
        raise SetupError(f"a batch of {batch_size} never decoded together; raise --decode-tokens")
    return sum(sum(step.tokens.values()) for step in window[1:]) / (window[-1].at_s - window[0].at_s)


def _limits(settings: BenchSettings, loaded: LoadedModel) -> EngineSettings:
    """Room for the largest batch and little more, so that the resident size is the model's."""
    usual, sequences = EngineSettings(), 1 + max(settings.batch_sizes)
    blocks = 1 - (-settings.tokens // usual.block_size)
    return EngineSettings(
        max_num_seqs=sequences,
        max_num_batched_tokens=max(usual.max_num_batched_tokens, sequences),
        max_model_len=min(blocks * usual.block_size, loaded.context_length),
        threads=settings.threads,
    )


@contextmanager
def _serving(loaded: LoadedModel, settings: BenchSettings) -> Iterator[_Served]:
    served = _Served(loaded, settings)
    served.engine.start()
    try:
        yield served
    finally:
        served.engine.close()


def _result(loaded: LoadedModel, engine: Engine, ready_s: float, speed: tuple[Speed, ...]) -> Bench:
    report = loaded.report
    return Bench(
        recipe=report.recipe,
        precision=report.precision,
        device=report.device,
        threads=torch.get_num_threads(),
        path=engine.path,
        artifact_hit=report.artifact_hit,
        load_s=report.load_s,
        ready_s=ready_s,
        total_bytes=report.total_bytes,
        weight_bytes=report.weight_bytes,
        quantization_bytes=report.quantization_bytes,
        embedding_bytes=report.embedding_bytes,
        bits_per_weight=report.bits_per_weight,
        compression_ratio=report.compression_ratio,
        kernels=report.kernels,
        kv_cache_bytes=engine.stats().kv_cache_bytes,
        peak_load_bytes=report.peak_load_bytes,
        resident_bytes=int(psutil.Process().memory_info().rss),
        peak_bytes=_peak_bytes(),
        device_peak_bytes=torch.cuda.max_memory_allocated() if report.device.startswith("cuda") else 0,
        speed=speed,
    )


def _peak_bytes() -> int:
    """The highest resident size of this process so far."""
    if _STATUS.exists():  # getrusage would also count what the parent held when it started this process
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return int(peak)
