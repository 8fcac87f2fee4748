"""One variant in one process: loads it, owns its engine, and hands the engine's events to the ingresses.

Three parties share the process. The event loop answers calls and never computes. The engine's thread computes and calls
back once per step. A worker thread loads the model and tokenizes. What cannot be loaded does not fall over: the replica
stays up in state "failed", says why, and refuses requests by that reason, while the other variants serve.

Knows no HTTP, no routing and no Ray; torch is first imported when loading begins.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from serve import metrics
from serve.errors import GenerationFailed, HalftoneError, Overloaded, VariantUnavailable
from serve.generation import Event, Failure, GenerationRequest, Prompt, SamplingParams, Tokenized
from serve.heartbeat import Orders, ReplicaBeat, State
from serve.hop import Outbox, Parcel
from serve.metrics import Recorder, VariantLabels
from serve.pairs import SCORING_PRIORITY, Kept, Recording, Scores, Side
from serve.place import here
from serve.resident import Resident
from serve.upkeep.limit import limit_of
from serve.variant import Variant
from serve.wire import Channel, Lines

if TYPE_CHECKING:
    from serve.drift import Keeper
    from serve.engine.witness import Witness
    from serve.kernels import Build
    from serve.loading import LoadedModel
    from serve.upkeep import Energy

__all__ = ["Replica"]

_LOG = logging.getLogger(__name__)
_BEAT_S = 1.0
_LOADING_BEAT_S = 0.25
_LEAST_BEAT_S = 0.1
_LOOK_S = 1.0
_REMEMBERED_ABORTS = 4096
_NEEDED = ("weights", "quantization", "kv_cache")
"""What a variant takes when it is loaded again, by component."""
_SCORED_AT_ONCE = 8
_SCORING_S = 30.0
"""How long a text may wait for users to leave room for its scoring."""

Report = Callable[[ReplicaBeat], Awaitable[Orders]]
"""Tells the controller, who answers with what is to be done. Raises HalftoneError where nobody answers."""


class Replica:
    """Serves one variant. All methods on one event loop; `process` names this process for good."""

    def __init__(self, model_name: str, variant: Variant, report: Report, process: str) -> None:
        self._variant = variant
        self._report = report
        self._process = process
        self._labels = VariantLabels(model_name, variant.name, variant.precision)
        self._state: State = "loading"
        self._stage = ("start", 0.0)
        self._reason: str | None = None
        self._serving: Resident | None = None
        self._retiring: Resident | None = None  # finishes what began on it
        self._loading = asyncio.Lock()
        self._build: Build | None = None
        self._report_due = False
        self._waiting = 0
        self._place = here()
        self._needs: Mapping[str, int] = {}
        self._recorder = Recorder()
        self._lines = Lines(process)
        self._outbox_of: dict[str, Outbox] = {}
        self._aborted: deque[str] = deque(maxlen=_REMEMBERED_ABORTS)
        self._keepers: dict[str, Keeper] = {}
        self._scorings = 0
        self._turned = asyncio.Event()  # from idle to busy or back: worth a beat out of turn
        self._tasks: set[asyncio.Task[None]] = set()

    # Life

    async def open(self) -> None:
        """Load the variant and serve it, or learn why not. Returns in either case."""
        self._loop = asyncio.get_running_loop()
        self._spawn(self._beat_for_ever())
        self._spawn(self._look_for_ever())
        await self._come_up()

    async def _come_up(self) -> None:
        self._state, self._reason = "loading", None
        async with self._loading:
            loading = asyncio.ensure_future(asyncio.to_thread(self._load))
            await asyncio.wait([loading])
        if (error := loading.exception()) is None:
            self._serving = loading.result()
            await self._warm_up()
            await asyncio.to_thread(self._serving.upkeep.look)
            self._state, self._report_due = "ready", True
            if self._build:
                self._spawn(self._renew(self._build))
        else:
            self._state, self._reason = "failed", _reason(error)
            _LOG.error("variant %s cannot be served: %s", self._variant.name, self._reason, exc_info=error)
        await self._beat()

    async def _renew(self, build: Build) -> None:
        """Once the kernels are built, answer with them what comes from then on; what runs ends as it began."""
        await asyncio.to_thread(build.wait)
        async with self._loading:
            if self._build is not build or (old := self._serving) is None or self._state != "ready":
                return  # its memory was given back meanwhile: the next load takes the kernels
            self._build = None
            renewed = await asyncio.to_thread(self._load_anew, old, build)
            self._report_due = True
            if renewed is None or self._state != "ready":
                return
            renewed.engine.start()
            self._serving, self._retiring = renewed, old
        await asyncio.to_thread(old.engine.close, drain=True)
        self._retiring = None
        del old
        await asyncio.to_thread(_trim)
        await asyncio.to_thread(renewed.begin)

    async def close(self) -> None:
        """End the engine and say goodbye. What is still open fails."""
        if self._build:
            self._build.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._serving:
            await asyncio.to_thread(self._serving.close)
        if self._retiring:
            await asyncio.to_thread(self._retiring.engine.close)
        await self._lines.close()
        await self._say(replace(self._now(), leaving=True))

    def check_health(self) -> None:
        """Raise if the engine's thread has died: then only a new process helps."""
        if self._serving and not self._serving.engine.is_alive:
            raise GenerationFailed(f"the engine of variant {self._variant.name!r} has died")

    # Calls

    async def generate(self, request: GenerationRequest, channel: Channel) -> Kept | None:
        """Answer a request: its events leave by `channel`, and this returns once the last one has left.

        Returns the recording of a request whose pass was to be kept.
        """
        if request.request_id in self._aborted:
            return None
        return await self._answer(request, self._lines.outbox(channel))

    async def _answer(self, request: GenerationRequest, outbox: Outbox, witness: Witness | None = None) -> Kept | None:
        request_id = request.request_id
        outbox.open(request)
        if not self._outbox_of:
            self._turned.set()
        self._outbox_of[request_id] = outbox
        self._spawn(self._submit(request, witness))
        whole = False
        try:
            await outbox.ended(request_id)
            whole = True
            return await self._recording(request_id)
        finally:
            del self._outbox_of[request_id]
            if keeper := self._keepers.pop(request_id, None):
                keeper.close()
            if not whole:
                self._end_in_engine(request_id)
            if not self._outbox_of:
                self._turned.set()

    async def score(self, recording: Recording, side: Side) -> Scores:
        """Read what another variant recorded: one prefill that yields to users, and the comparison beside it.

        Raises Overloaded where users left no room for it.
        """
        serving = self._require()
        if self._scorings >= _SCORED_AT_ONCE:
            raise Overloaded(f"{self._scorings} texts wait for their scoring already")
        pairing = serving.pairing(recording, side)
        name = f"score-{uuid4().hex}"
        params = SamplingParams(max_tokens=0)
        request = GenerationRequest(name, recording.token_ids, params, priority=SCORING_PRIORITY)
        self._scorings += 1
        try:
            async with asyncio.timeout(_SCORING_S):
                await self._answer_here(request, pairing)
        except TimeoutError as error:
            raise Overloaded("users left no room to score a text") from error
        finally:
            self._scorings -= 1
        return pairing.scores()

    async def _answer_here(self, request: GenerationRequest, witness: Witness | None = None) -> None:
        """Compute an answer that nobody reads. Raises what it failed with."""
        outbox, parcels = Outbox(self._process), list[Parcel]()
        outbox.lead(parcels.append)
        await self._answer(request, outbox, witness)
        for event in (event for parcel in parcels for event in parcel.events):
            if isinstance(event, Failure):
                raise event.error

    async def _recording(self, request_id: str) -> Kept | None:
        keeper = self._keepers.get(request_id)
        if keeper is None or request_id in self._aborted:
            return None
        recording = await asyncio.to_thread(keeper.recording)
        return Kept(recording) if recording else None

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests now; one that has not come yet will be turned away. Unknown ones are another replica's."""
        self._aborted.extend(request_ids)
        for request_id in request_ids:
            self._end_in_engine(request_id)
            if outbox := self._outbox_of.get(request_id):
                outbox.close(request_id)

    def _end_in_engine(self, request_id: str) -> None:
        for serving in (self._serving, self._retiring):
            if serving:
                serving.engine.abort(request_id)

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool) -> Tokenized:
        serving = self._require()
        return await asyncio.to_thread(serving.tokenize, prompt, add_special_tokens)

    async def detokenize(self, ids: tuple[int, ...]) -> str:
        serving = self._require()
        return await asyncio.to_thread(serving.detokenize, ids)

    def _require(self) -> Resident:
        if self._serving is None or self._state == "freed":
            raise VariantUnavailable(f"variant {self._variant.name!r} is {self._state}: {self._reason or 'wait'}")
        return self._serving

    async def _submit(self, request: GenerationRequest, witness: Witness | None) -> None:
        """Tokenize, then hand over to the engine; what refuses the request becomes its one event."""
        try:
            ids = await asyncio.to_thread(self._require().encode, request)
            serving = self._require()  # perhaps another one by now
            if request.request_id in self._outbox_of and request.request_id not in self._aborted:
                if request.keep:
                    witness = self._keepers[request.request_id] = serving.keeper(request.keep, ids)
                serving.engine.submit(replace(request, prompt=ids), witness)
        except HalftoneError as error:
            self._deliver([Failure(request.request_id, error)])

    def _deliver(self, events: Sequence[Event]) -> None:
        """One step's events, each to the outbox of its ingress."""
        by_outbox: dict[Outbox, list[Event]] = defaultdict(list)
        for event in events:
            if outbox := self._outbox_of.get(event.request_id):
                by_outbox[outbox].append(event)
            if keeper := self._keepers.get(event.request_id):
                keeper.hear(event)
        for outbox, mine in by_outbox.items():
            outbox.put(mine)

    def _on_step(self, events: list[Event]) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._deliver, events)

    # Loading, on a worker thread

    def _load(self) -> Resident:
        # Idle OpenMP threads must sleep: variants share the cores, and a spinning one takes them from its neighbour.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        self._progress("import", 0, 1)
        import torch

        from serve.engine.engine import Engine  # noqa: F401  imported before memory is counted
        from serve.kernels import build_aside
        from serve.upkeep import Upkeep

        upkeep = Upkeep(self._variant.device)
        if threads := self._variant.engine.threads:
            torch.set_num_threads(threads)
        self._build = None if self._variant.device.startswith("cuda") else build_aside()
        return Resident.of(self._read(self._progress), self._variant, self._on_step, upkeep)

    def _read(self, progress: Callable[[str, int, int], None]) -> LoadedModel:
        from serve.compression.artifact import default_root
        from serve.loading import load

        variant = self._variant
        return load(
            variant.source,
            variant.recipe,
            device=variant.device,
            calibration=variant.calibration,
            artifacts=default_root(),
            progress=progress,
        )

    def _load_anew(self, old: Resident, build: Build) -> Resident | None:
        """The model once more, for the kernels that were built; None where it stays as it is, and `path` says why."""
        from serve.kernels import BEING_BUILT

        reason, name = build.take(), self._variant.name
        if reason is None and old.gains_by_kernels:
            try:
                old.require_room(limit_of(self._variant.device).available_bytes)
                renewed = old.renewed(self._read(lambda *_: None), self._on_step)
            except Exception as error:  # noqa: BLE001  whatever it is, what serves goes on serving
                _LOG.exception("variant %s stays on the plain path", name)
                reason = f"the native path is built, and taken at the next start: {_reason(error)}"
            else:
                _LOG.info("variant %s: %s", name, renewed.path)
                return renewed
        old.path = old.path.replace(BEING_BUILT, reason or "")
        _LOG.info("variant %s: %s", name, old.path)
        return None

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._stage = (stage, done / total if total else 0.0)

    async def _warm_up(self) -> None:
        """One short answer, so that the first client does not pay for what torch does once."""
        self._stage = ("warm up", 0.0)
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        request = GenerationRequest("warm-up", (0, 0), params)
        with suppress(HalftoneError):  # a client that meets the same learns it
            await self._answer_here(request)

    # Reports

    async def _beat_for_ever(self) -> None:
        while True:
            self._turned.clear()
            await self._beat()
            await asyncio.sleep(_LEAST_BEAT_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOADING_BEAT_S if self._state == "loading" else _BEAT_S):
                    await self._turned.wait()

    async def _look_for_ever(self) -> None:
        while True:
            if self._serving and self._state == "ready":
                await asyncio.to_thread(self._serving.upkeep.look)
            await asyncio.sleep(_LOOK_S)

    async def _beat(self) -> None:
        """The report travels until it has arrived once."""
        with_report = self._report_due
        if (orders := await self._say(self._now())) is None:
            return
        wanted = orders.report_wanted
        self._report_due = wanted if with_report else self._report_due or wanted
        if not orders.resident and self._state == "ready":
            self._state = "freed"
            self._spawn(self._free())
        elif orders.resident and self._state == "freed" and self._serving is None:
            self._state = "loading"
            self._spawn(self._come_up())

    async def _free(self) -> None:
        """Give the model's memory back once open streams have run out; new requests are refused from now on."""
        while self._outbox_of:  # noqa: ASYNC110  as rare as it is unhurried
            await asyncio.sleep(_LEAST_BEAT_S)
        serving, self._serving = self._serving, None
        if serving:
            await asyncio.to_thread(serving.close)
            del serving
            await asyncio.to_thread(_trim)
        await self._beat()

    async def _say(self, beat: ReplicaBeat) -> Orders | None:
        try:
            return await self._report(beat)
        except HalftoneError as error:
            _LOG.warning("the controller does not answer: %s", error.message)
            return None

    def _now(self) -> ReplicaBeat:
        stage, progress = self._stage
        beat = ReplicaBeat(
            self._process, self._variant.name, self._state, stage, progress, self._reason, place=self._place
        )
        if self._state == "freed":
            return replace(beat, needs=self._needs, available_bytes=limit_of(self._variant.device).available_bytes)
        if self._serving is None or self._state != "ready":
            return beat
        memory, energy = self._serving.upkeep.memory, self._serving.upkeep.energy
        limit = limit_of(self._variant.device)
        self._needs = {component: memory[component] for component in _NEEDED}
        self._record(self._serving, memory, energy)
        self._recorder.set(metrics.MEMORY_USED, self._labels, limit.used_ratio)
        return replace(
            beat,
            context_length=self._serving.context_length,
            fingerprint=self._serving.loaded.fingerprint,
            head=head.digest if (head := self._serving.engine.head) else None,
            waiting=self._still_waiting(self._serving.engine.stats().waiting),
            report=self._serving.report() if self._report_due else None,
            memory=memory,
            energy=energy.told,
            needs=self._needs,
            available_bytes=limit.available_bytes,
            snapshot=self._recorder.snapshot(),
        )

    def _still_waiting(self, waiting: int) -> int:
        """As many as wait now and waited a beat ago: whoever has just come in waits for a step at most."""
        before, self._waiting = self._waiting, waiting
        return min(before, waiting)

    def _record(self, serving: Resident, memory: Mapping[str, int], energy: Energy) -> None:
        stats, report, labels = serving.engine.stats(), serving.loaded.report, self._labels
        self._recorder.set(metrics.RUNNING, labels, stats.running)
        self._recorder.set(metrics.WAITING, labels, stats.waiting)
        self._recorder.set(metrics.KV_USAGE, labels, stats.kv_blocks_used / max(1, stats.kv_blocks_total))
        self._recorder.follow(metrics.PREEMPTIONS, labels, stats.preemptions)
        self._recorder.follow(metrics.PREFIX_QUERIES, labels, stats.prefix_cache_queries)
        self._recorder.follow(metrics.PREFIX_HITS, labels, stats.prefix_cache_hits)
        if energy.joules is not None:
            self._recorder.follow(metrics.ENERGY, labels, energy.joules)
            self._recorder.follow(metrics.ENERGY_TOKENS, labels, energy.tokens)
        self._recorder.set(metrics.PEAK_LOAD, labels, report.peak_load_bytes)
        self._recorder.set(metrics.BITS, labels, report.bits_per_weight)
        self._recorder.set(metrics.COMPRESSION, labels, report.compression_ratio)
        for component, size in memory.items():
            self._recorder.set(metrics.MEMORY, labels, size, component)
        for stage, seconds in report.seconds.items():
            self._recorder.set(metrics.LOAD, labels, seconds, stage)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _reason(error: BaseException) -> str:
    if isinstance(error, HalftoneError):
        return error.message
    return f"{type(error).__name__}: {error or 'no message'}".splitlines()[0][:300]


def _trim() -> None:
    """Freed layers go back to the system, not only to the allocator."""
    import gc

    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
