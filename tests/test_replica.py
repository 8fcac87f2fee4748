"""One variant in one process, without Ray: it loads, says so, answers over the hop, and outlives what cannot load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from serve.config import Config, serve_source
from serve.errors import ContextLengthExceeded, GenerationFailed, HalftoneError, InvalidRequest, VariantUnavailable
from serve.generation import Delta, Event, Failure, GenerationRequest, Prompt, PromptDelta, SamplingParams
from serve.heartbeat import Orders, ReplicaBeat
from serve.hop import Parcel
from serve.replica import Replica
from serve.upkeep.energy import EnergyMeter, Processor
from serve.upkeep.rapl import Rapl
from tests.ingress import Ingress
from tests.upkeep.powercap import Powercap


class Beats:
    """A controller that listens."""

    def __init__(self) -> None:
        self.heard: list[ReplicaBeat] = []
        self.gone = False
        self.resident = True

    async def __call__(self, beat: ReplicaBeat) -> Orders:
        if self.gone:
            raise VariantUnavailable("the controller does not answer")
        self.heard.append(beat)
        wanted = beat.state == "ready" and not any(heard.report for heard in self.heard)
        return Orders(wanted, self.resident)


def config(source: str = "builtin:storyteller", recipe: str = "int8") -> Config:
    return serve_source(source, (recipe,)).resolved(cpus=1, gpus=0)


def replica_of(made: Config, beats: Beats) -> Replica:
    return Replica(made.model_name, made.variants[0], beats, "process")


@pytest.fixture
async def beats() -> Beats:
    return Beats()


@pytest.fixture
async def replica(beats: Beats) -> AsyncIterator[Replica]:
    made = replica_of(config(), beats)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def ingress() -> AsyncIterator[Ingress]:
    made = Ingress()
    await made.open()
    yield made
    await made.close()


def request(name: str, prompt: Prompt = "Once upon a time", **params: object) -> GenerationRequest:
    options = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True, **params}
    return GenerationRequest(name, prompt, SamplingParams(**options))  # type: ignore[arg-type]


async def parcels(replica: Replica, *requests: GenerationRequest) -> list[Parcel]:
    """What comes of requests by the time that all have ended, at an ingress that is theirs alone."""
    ingress = Ingress()
    channel = await ingress.open()
    await asyncio.wait_for(asyncio.gather(*(replica.generate(one, channel) for one in requests)), 60)
    names = {one.request_id for one in requests} - set(replica._aborted)
    await ingress.until(lambda heard: names == {event.request_id for event in heard if is_last(event)})
    await ingress.close()
    return ingress.heard


def is_last(event: Event) -> bool:
    return isinstance(event, Failure) or (isinstance(event, Delta) and event.finish_reason is not None)


def has_tokens(heard: list[Event]) -> bool:
    return any(isinstance(event, Delta) for event in heard)


def events(ridden: list[Parcel]) -> list[Event]:
    return [event for parcel in ridden for event in parcel.events]


async def test_requests_of_one_ingress_share_their_parcels(replica: Replica) -> None:
    ridden = await parcels(replica, *(request(f"r{index}", max_tokens=20) for index in range(12)))
    made = events(ridden)
    assert sum(len(event.token_ids) for event in made if isinstance(event, Delta)) == 240
    assert len(ridden) < 240 / 4
    for index in range(12):
        mine = [event for event in made if event.request_id == f"r{index}"]
        assert isinstance(mine[0], PromptDelta)
        assert isinstance(mine[-1], Delta)
        assert mine[-1].finish_reason == "length"


async def test_it_reports_how_it_loads_and_what_it_holds(replica: Replica, beats: Beats) -> None:
    await parcels(replica, request("a"))
    loading = {beat.state for beat in beats.heard[:-1]}
    ready = next(beat for beat in beats.heard if beat.state == "ready")
    assert "loading" in loading
    assert ready.report is not None
    assert ready.report["bits_per_weight"] < 9
    assert ready.memory["process"] > ready.memory["weights"] > 0
    assert ready.context_length == 1024
    names = {name for name, _ in ready.snapshot.values}
    assert {"memory_bytes", "memory_used_ratio", "compression_ratio", "load_seconds", "kv_cache_usage_ratio"} <= names


async def test_energy_is_counted_while_it_answers_and_is_unavailable_where_no_counter_is(
    beats: Beats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    powercap = Powercap(tmp_path / "powercap")
    meter = EnergyMeter([Processor(Rapl(tmp_path / "powercap"))])
    monkeypatch.setattr(EnergyMeter, "of", lambda device: meter)
    replica = replica_of(config(), beats)
    await replica.open()
    values: dict[str, float] = {}
    added = 0.0
    while not values.get("energy_joules_total"):  # the replica's own look may fall where it has done nothing yet
        assert added < 200.0
        powercap.add("0", 10.0)
        added += 10.0
        await parcels(replica, request(f"{added}", max_tokens=40))
        assert replica._serving
        await asyncio.to_thread(replica._serving.upkeep.look)
        values = {name: value for (name, _), value in replica._now().snapshot.values.items()}
    assert values["energy_joules_total"] <= added
    assert values["energy_tokens_total"] >= 40
    assert replica._now().energy.startswith("RAPL package-0, dram, package-1 (this process's part")
    powercap.file("0").unlink()
    await asyncio.to_thread(replica._serving.upkeep.look)
    assert replica._now().energy.startswith("unavailable: ")
    kept = {name: value for (name, _), value in replica._now().snapshot.values.items()}
    assert kept["energy_joules_total"] == values["energy_joules_total"]  # no counter falls
    await replica.close()


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("word " * 3000, ContextLengthExceeded),
        ((1, 2, 10**6), InvalidRequest),
        ("nul \0", InvalidRequest),
    ],
)
async def test_what_refuses_a_request_is_its_one_event(
    replica: Replica, prompt: Prompt, error: type[HalftoneError]
) -> None:
    made = events(await parcels(replica, request("bad", prompt)))
    assert [type(event) for event in made] == [Failure]
    assert isinstance(made[0], Failure)
    assert isinstance(made[0].error, error)


async def test_an_abort_ends_the_call_and_frees_the_engine(replica: Replica, ingress: Ingress) -> None:
    call = asyncio.create_task(replica.generate(request("a", max_tokens=900), ingress.channel))
    await ingress.until(has_tokens)
    await replica.abort(["a", "unknown"])
    await asyncio.wait_for(call, 10)
    assert not any(map(is_last, ingress.events))
    async with asyncio.timeout(10):
        while is_running(replica):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def is_running(replica: Replica) -> bool:
    values = replica._now().snapshot.values
    return any(value for (name, _), value in values.items() if name == "num_requests_running")


async def test_an_abort_that_comes_before_its_request_turns_it_away(replica: Replica) -> None:
    await replica.abort(["late"])
    assert await parcels(replica, request("late")) == []


async def test_a_call_that_is_cancelled_aborts_its_request_and_no_other(replica: Replica, ingress: Ingress) -> None:
    first = asyncio.create_task(replica.generate(request("a", max_tokens=900), ingress.channel))
    await ingress.until(has_tokens)
    second = asyncio.create_task(replica.generate(request("b", max_tokens=30), ingress.channel))
    first.cancel()
    await asyncio.wait_for(second, 60)
    made = await ingress.until(lambda heard: any(map(is_last, heard)))
    assert [event.request_id for event in made if is_last(event)] == ["b"]
    async with asyncio.timeout(10):
        while is_running(replica):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_an_ingress_that_goes_away_ends_what_it_asked_for_and_the_next_is_answered(
    replica: Replica, ingress: Ingress
) -> None:
    call = asyncio.create_task(replica.generate(request("a", max_tokens=900), ingress.channel))
    await ingress.until(has_tokens)
    await ingress.close()
    with pytest.raises(GenerationFailed, match="broke"):
        await asyncio.wait_for(call, 10)
    async with asyncio.timeout(10):
        while is_running(replica):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    with pytest.raises(VariantUnavailable, match="cannot reach"):
        await asyncio.wait_for(replica.generate(request("b"), ingress.channel), 10)
    assert any(map(is_last, events(await parcels(replica, request("c")))))


async def test_text_goes_there_and_back(replica: Replica) -> None:
    tokenized = await replica.tokenize("Once upon a time", True)
    assert "".join(tokenized.pieces) == await replica.detokenize(tokenized.ids)
    assert tokenized.context_length == 1024


async def test_a_controller_that_is_gone_disturbs_nobody(replica: Replica, beats: Beats) -> None:
    beats.gone = True
    assert events(await parcels(replica, request("a")))
    beats.gone = False


async def test_what_cannot_load_stays_up_and_says_why(tmp_path: Path, beats: Beats) -> None:
    replica = replica_of(config(str(tmp_path)), beats)
    await replica.open()
    replica.check_health()
    assert beats.heard[-1].state == "failed"
    assert "config.json" in (beats.heard[-1].reason or "")
    made = events(await parcels(replica, request("a")))
    assert isinstance(made[0], Failure)
    assert isinstance(made[0].error, VariantUnavailable)
    assert "config.json" in made[0].error.message
    with pytest.raises(VariantUnavailable):
        await replica.tokenize("x", True)
    await replica.close()
    assert beats.heard[-1].leaving


async def test_an_engine_that_has_died_is_ill(replica: Replica) -> None:
    replica.check_health()
    assert replica._serving is not None
    await asyncio.to_thread(replica._serving.engine.close)
    with pytest.raises(HalftoneError, match="has died"):
        replica.check_health()


async def test_a_replica_gives_its_memory_back_when_it_is_told_and_loads_again_when_it_is_wanted(
    replica: Replica, beats: Beats, ingress: Ingress
) -> None:
    async def until(state: str) -> ReplicaBeat:
        async with asyncio.timeout(60):
            while beats.heard[-1].state != state or (state == "freed" and replica._serving):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return beats.heard[-1]

    loaded = await until("ready")
    assert loaded.needs["weights"] > 1_000_000
    open_call = asyncio.create_task(replica.generate(request("open", max_tokens=40), ingress.channel))
    await ingress.until(has_tokens)
    beats.resident = False
    async with asyncio.timeout(10):
        while replica._state != "freed":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    refused = events(await parcels(replica, request("late")))
    assert isinstance(refused[-1], Failure)
    await asyncio.wait_for(open_call, 60)
    heard = await ingress.until(lambda heard: any(map(is_last, heard)))
    assert sum(len(event.token_ids) for event in heard if isinstance(event, Delta)) == 40
    freed = await until("freed")
    assert not freed.memory
    assert freed.needs == loaded.needs  # what it would take again
    assert freed.available_bytes
    beats.resident = True
    await until("ready")
    assert any(isinstance(event, Delta) for event in events(await parcels(replica, request("again"))))


async def test_only_a_queue_that_lasts_from_one_report_to_the_next_is_called_waiting(
    beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = replica_of(config(), beats)
    await replica.open()
    assert replica._serving
    stats = replica._serving.engine.stats()
    told = []
    for waiting in (0, 3, 2, 5, 0, 4):
        monkeypatch.setattr(replica._serving.engine, "stats", lambda waiting=waiting: replace(stats, waiting=waiting))
        told.append(replica._now().waiting)
    assert told == [0, 0, 2, 2, 0, 0]
    await replica.close()
