"""Traffic goes where pins and the split say, and every request ends, whatever dies. All behind the router is fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from serve import router as router_module
from serve.api.backend import Backend, Call
from serve.errors import (
    GenerationFailed,
    HalftoneError,
    InvalidRequest,
    Overloaded,
    UnknownModel,
    VariantUnavailable,
)
from serve.generation import (
    Delta,
    Event,
    Failure,
    GenerationRequest,
    Prompt,
    PromptDelta,
    SamplingParams,
    Timing,
    Tokenized,
)
from serve.heartbeat import IngressBeat, State, VariantState, View
from serve.hop import Inbox, Parcel, ReplicaDied
from serve.metrics import Snapshot
from serve.pairs import DriftSettings, Kept, Scores, Side
from serve.rollout import Outcome, Split, assign
from serve.router import RoutedAnswer, Router
from serve.wire import Channel

CHANNEL = Channel("127.0.0.1", 1, b"")


class FakeLink:
    """A replica of a few lines: says `tokens` words, or what its script tells it to."""

    def __init__(self, name: str, inbox: Inbox) -> None:
        self.name = name
        self._inbox = inbox
        self.tokens = 3
        self.script: list[HalftoneError | None] = []
        self.die_after: int | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.asked: list[str] = []
        self.aborted: list[str] = []
        self.drop_last = False
        self.stuck = False
        self.read: list[tuple[str, str, str]] = []
        self.blind: HalftoneError | None = None

    async def generate(self, request: GenerationRequest, channel: Channel) -> Kept | None:
        assert channel == CHANNEL
        async for parcel in self._parcels(request):
            self._inbox.accept(parcel)
            await asyncio.sleep(0)
        return Kept((self.name, request.keep)) if request.keep else None

    async def score(self, kept: Kept, side: Side) -> Scores:
        self.read.append((*kept.content, side))
        if self.blind:
            raise self.blind
        return Scores((0.01, 0.03, 0.02), 2, 1, -0.1, 1, 5, 11.0, 10.0)

    async def _parcels(self, request: GenerationRequest) -> AsyncIterator[Parcel]:
        self.asked.append(request.request_id)
        error = self.script.pop(0) if self.script else None
        if error:
            raise error
        if self.stuck:
            await asyncio.Event().wait()
        replica = f"{self.name}-{len(self.asked)}"
        yield Parcel(replica, (PromptDelta(request.request_id, (1, 2)),))
        for position in range(self.tokens):
            await self.hold.wait()
            if request.request_id in self.aborted:
                return
            if self.die_after == position:
                self.die_after = None
                raise ReplicaDied("gone", retry_after_s=1)
            if self.drop_last and position == self.tokens - 1:
                return
            yield Parcel(replica, tuple(self._events(request, position)))

    def _events(self, request: GenerationRequest, position: int) -> list[Event]:
        last = position == self.tokens - 1
        timing = Timing(0.001, 0.002, 0.003, running_sequences=2) if last else None
        return [
            Delta(
                request.request_id, choice, f"{self.name} ", (position,), (), "length" if last else None, None, timing
            )
            for choice in range(request.n)
        ]

    async def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted += request_ids

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool) -> Tokenized:
        return Tokenized((1,), (self.name,), 512)

    async def detokenize(self, ids: tuple[int, ...]) -> str:
        return self.name


class FakeControl:
    """A controller that keeps what it is told and answers with one view."""

    def __init__(self, states: Mapping[str, State], weights: Mapping[str, float]) -> None:
        self.split = Split(stable=next(iter(weights)), weights=weights, salt="salt")
        self.states = dict(states)
        self.replicas = 2
        self.waiting = 0
        self.outcomes: dict[int, Outcome] = {}
        self.deaths: Mapping[str, int] = {}
        self.snapshot = Snapshot()
        self.gone = False
        self.is_young = False

    @property
    def view(self) -> View:
        return View(
            self.split,
            tuple(
                VariantState(
                    name,
                    name,
                    state,
                    reason="no file" if state == "failed" else None,
                    fingerprint=f"f-{name}",
                    ready_replicas=self.replicas if state == "ready" else 0,
                    head="same",
                    waiting=self.waiting,
                )
                for name, state in self.states.items()
            ),
        )

    async def ingress(self, beat: IngressBeat) -> View:
        if self.gone:
            raise VariantUnavailable("the controller does not answer")
        self.outcomes |= {outcome.record: outcome for outcome in beat.batch.outcomes}
        self.snapshot, self.deaths = beat.snapshot, beat.deaths
        return replace(self.view, is_young=self.is_young)

    async def set_traffic(self, weights: Mapping[str, float], shadow: Mapping[str, float] | None) -> View:
        moved = self.split.moved(weights)
        self.split = moved if shadow is None else replace(moved, shadow=shadow)
        return self.view

    async def metrics(self, beat: IngressBeat) -> str:
        await self.ingress(beat)
        return "text"

    async def variants(self) -> Sequence[Mapping[str, Any]]:
        return []

    def counted(self, name: str, *labels: str) -> float:
        return sum(
            value
            for (metric, values), value in self.snapshot.values.items()
            if metric == name and all(label in values for label in labels)
        )


class Stage:
    """A router with its fakes."""

    def __init__(
        self, states: Mapping[str, State], weights: Mapping[str, float], drift: DriftSettings | None = None
    ) -> None:
        inbox = Inbox()
        self.links = {name: FakeLink(name, inbox) for name in states}
        self.control = FakeControl(states, weights)
        self.router = Router("m", self.links, self.control, inbox, CHANNEL, name="ingress", drift=drift)
        self._numbers = iter(range(1000))

    async def beat(self) -> Stage:
        await self.router.beat()
        return self

    def call(self, model: str = "m", prompts: int = 1, n: int = 1, **options: Any) -> Call:
        names = [f"r{next(self._numbers)}" for _ in range(prompts)]
        return Call(model, tuple(GenerationRequest(name, "x", SamplingParams(), n=n) for name in names), **options)

    async def ask(self, *arguments: Any, **options: Any) -> tuple[RoutedAnswer, list[Event]]:
        answer = await self.router.start(self.call(*arguments, **options))
        async with asyncio.timeout(10):
            return answer, [event async for event in answer.events()]

    async def settled(self) -> None:
        """All streams have run out."""
        async with asyncio.timeout(10):
            while self.router.open_requests:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture
async def two() -> AsyncIterator[Stage]:
    stage = await Stage({"bf16": "ready", "int8": "ready"}, {"bf16": 100, "int8": 0}).beat()
    yield stage
    await stage.router.close()


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_a_pin_in_the_name_or_in_the_header_decides(two: Stage) -> None:
    for arguments in ({"model": "m@int8"}, {"pin": "int8"}, {"model": "m@int8", "pin": "int8"}):
        answer, events = await two.ask(**arguments)
        assert (answer.disclosure.variant, answer.disclosure.route) == ("int8", "pinned")
        assert answer.disclosure.fingerprint == "f-int8"
        assert text(events) == "int8 " * 3


async def test_pins_that_contradict_each_other_are_refused(two: Stage) -> None:
    with pytest.raises(InvalidRequest, match="name one of them"):
        await two.router.start(two.call("m@int8", pin="bf16"))


@pytest.mark.parametrize("arguments", [{"model": "gpt"}, {"model": "m@x"}, {"model": "m@"}, {"pin": "x"}])
async def test_an_unknown_name_is_told_what_is_served(two: Stage, arguments: dict[str, str]) -> None:
    with pytest.raises(UnknownModel, match="served: m, m@bf16, m@int8"):
        await two.router.start(two.call(**arguments))


async def test_the_split_deals_and_a_sticky_key_stays(two: Stage) -> None:
    await two.router.set_traffic({"bf16": 50, "int8": 50})
    dealt = [(await two.ask())[0].disclosure for _ in range(60)]
    assert {disclosure.route for disclosure in dealt} == {"weighted"}
    assert {disclosure.variant for disclosure in dealt} == {"bf16", "int8"}
    kept = [(await two.ask(sticky_key="ada"))[0].disclosure for _ in range(20)]
    assert len({disclosure.variant for disclosure in kept}) == 1
    assert {disclosure.route for disclosure in kept} == {"sticky"}


async def test_new_weights_apply_to_the_very_next_request(two: Stage) -> None:
    split = await two.router.set_traffic({"bf16": 0, "int8": 100})
    assert split["revision"] == 1
    assert (await two.ask())[0].disclosure.variant == "int8"
    split = await two.router.set_traffic({"bf16": 100}, {"int8": 0.5})
    assert split["shadow"] == {"int8": 0.5}
    assert (await two.router.set_traffic({"bf16": 100}))["shadow"] == {"int8": 0.5}


async def test_an_older_split_never_replaces_a_newer_one(two: Stage) -> None:
    old = two.control.split
    await two.router.set_traffic({"bf16": 0, "int8": 100})
    two.control.split = old
    await two.router.beat()
    assert (await two.ask())[0].disclosure.variant == "int8"


async def test_the_last_split_stays_in_force_when_the_controller_is_gone(two: Stage) -> None:
    two.control.gone = True
    with pytest.raises(HalftoneError):
        await two.router.beat()
    assert text((await two.ask())[1]) == "bf16 " * 3
    two.control.gone = False
    await two.router.beat()
    assert [outcome.ok for outcome in two.control.outcomes.values()] == [True]


async def test_who_asks_for_the_split_hears_what_was_decided_just_now_and_is_dealt_by_it(two: Stage) -> None:
    two.control.split = two.control.split.moved({"bf16": 0, "int8": 100})  # by an experiment, or another ingress
    assert (await two.router.traffic())["weights"] == {"bf16": 0, "int8": 100}
    assert (await two.ask())[0].disclosure.variant == "int8"
    two.control.gone = True
    assert (await two.router.traffic())["weights"] == {"bf16": 0, "int8": 100}


async def test_weighted_traffic_skips_a_failed_variant_and_a_pin_learns_the_reason() -> None:
    stage = await Stage({"bf16": "ready", "int8": "failed"}, {"bf16": 10, "int8": 90}).beat()
    assert {(await stage.ask())[0].disclosure.variant for _ in range(20)} == {"bf16"}
    with pytest.raises(VariantUnavailable, match="'int8' could not be loaded: no file") as refused:
        await stage.router.start(stage.call("m@int8"))
    assert refused.value.retry_after_s
    assert stage.router.ready()


async def test_without_any_ready_variant_the_answer_is_unavailable() -> None:
    stage = Stage({"bf16": "loading", "int8": "ready"}, {"bf16": 100, "int8": 0})
    with pytest.raises(VariantUnavailable, match="starting"):
        await stage.router.start(stage.call())
    await stage.beat()
    with pytest.raises(VariantUnavailable, match="'bf16' is loading"):
        await stage.router.start(stage.call())
    assert not stage.router.ready()
    assert [card.state for card in stage.router.models()] == ["loading", "loading", "ready"]


async def test_all_prompts_of_a_call_go_to_one_variant_and_all_choices_end(two: Stage) -> None:
    answer, events = await two.ask(prompts=3, n=2, sticky_key="x")
    ends = [event for event in events if isinstance(event, Delta) and event.finish_reason]
    assert len(ends) == 6
    assert text(events) == f"{answer.disclosure.variant} " * 18


async def test_a_replica_that_dies_before_the_first_token_is_replaced_unseen(two: Stage) -> None:
    two.links["bf16"].script = [ReplicaDied("gone", retry_after_s=1)]
    assert text((await two.ask())[1]) == "bf16 " * 3
    two.links["bf16"].die_after = 0
    _, events = await two.ask()
    assert [type(event) for event in events] == [PromptDelta, Delta, Delta, Delta]
    assert text(events) == "bf16 " * 3
    assert len(two.links["bf16"].asked) == 4


async def test_a_replica_that_dies_later_fails_the_request_once(two: Stage) -> None:
    two.links["bf16"].die_after = 1
    _, events = await two.ask()
    assert isinstance(events[-1], Failure)
    assert isinstance(events[-1].error, ReplicaDied)
    assert len(two.links["bf16"].asked) == 1


async def test_a_replica_that_dies_twice_is_not_tried_a_third_time(two: Stage) -> None:
    two.links["bf16"].script = [ReplicaDied("gone"), ReplicaDied("gone"), None]
    _, events = await two.ask()
    assert [type(event) for event in events] == [Failure]
    assert len(two.links["bf16"].asked) == 2


async def test_a_full_queue_comes_first_and_says_when_to_come_back(two: Stage) -> None:
    two.links["bf16"].script = [Overloaded("full", retry_after_s=3)]
    _, events = await two.ask()
    assert isinstance(events[0], Failure)
    assert isinstance(events[0].error, Overloaded)
    await two.beat()
    assert two.control.counted("request_errors_total", "overloaded") == 1


async def test_an_answer_whose_end_is_lost_fails_instead_of_hanging(
    two: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "_LATE_S", 0.05)
    two.links["bf16"].drop_last = True
    _, events = await two.ask()
    assert isinstance(events[-1], Failure)
    assert isinstance(events[-1].error, GenerationFailed)
    two.links["bf16"].drop_last = False
    assert text((await two.ask())[1]) == "bf16 " * 3


async def test_who_leaves_aborts_what_is_unfinished_and_nothing_stays_open(two: Stage) -> None:
    two.links["bf16"].hold.clear()
    answer = await two.router.start(two.call(prompts=2))
    await anext(answer.events())
    await answer.cancel()
    await answer.cancel()
    two.links["bf16"].hold.set()
    await two.settled()
    assert sorted(two.links["bf16"].aborted) == ["r0", "r1"]
    await two.beat()
    (outcome,) = two.control.outcomes.values()
    assert outcome.client_fault
    assert outcome.finish_reason == "abort"
    assert two.control.counted("request_success_total", "abort") == 2


async def test_leaving_after_the_end_aborts_nothing(two: Stage) -> None:
    answer, _ = await two.ask()
    await answer.cancel()
    await two.settled()
    assert two.links["bf16"].aborted == []


async def test_each_call_leaves_one_outcome_open_first_then_ended(two: Stage) -> None:
    two.links["bf16"].hold.clear()
    answer = await two.router.start(two.call(sticky_key="ada"))
    await two.beat()
    assert [outcome.is_open for outcome in two.control.outcomes.values()] == [True]
    two.links["bf16"].hold.set()
    assert [event async for event in answer.events()]
    await two.beat()
    (outcome,) = two.control.outcomes.values()
    assert outcome.ok
    assert (outcome.variant, outcome.route, outcome.prompt_tokens, outcome.completion_tokens) == (
        "bf16",
        "sticky",
        2,
        3,
    )
    assert outcome.unit is not None
    assert outcome.unit != "ada"
    assert outcome.ttft_s is not None
    assert outcome.e2e_s is not None
    assert outcome.itl_mean_s is not None
    assert 0 <= outcome.ttft_s <= outcome.e2e_s
    assert outcome.running_sequences == 2


async def test_an_acknowledged_outcome_is_not_sent_again(two: Stage) -> None:
    await two.ask()
    await two.beat()
    two.control.outcomes.clear()
    await two.beat()
    assert not two.control.outcomes


async def test_tokens_are_counted_once_each(two: Stage) -> None:
    await two.ask(prompts=2, n=2)
    await two.beat()
    assert two.control.counted("generation_tokens_total") == 12
    assert two.control.counted("prompt_tokens_total") == 4
    assert two.control.counted("request_success_total", "length") == 4
    counts = {name: sum(h.counts) for (name, labels), h in two.control.snapshot.histograms.items() if "bf16" in labels}
    assert counts["time_to_first_token_seconds"] == counts["e2e_request_latency_seconds"] == 2
    assert counts["inter_token_latency_seconds"] == 8
    assert counts["request_time_per_output_token_seconds"] == 4


async def test_what_came_to_no_variant_is_counted_by_its_code(two: Stage) -> None:
    with pytest.raises(UnknownModel):
        await two.router.start(two.call("gpt"))
    two.router.refused(400)
    await two.beat()
    assert two.control.counted("request_errors_total", "model_not_found") == 1
    assert two.control.counted("request_errors_total", "http_400") == 1


async def test_text_is_asked_of_the_stable_variant_or_of_the_pinned_one(two: Stage) -> None:
    assert (await two.router.tokenize("m", "x", True)).pieces == ("bf16",)
    assert await two.router.detokenize("m@int8", (1,)) == "int8"


async def test_the_router_is_the_rims_backend(two: Stage) -> None:
    backend: Backend = two.router
    assert [card.id for card in backend.models()] == ["m", "m@bf16", "m@int8"]
    assert await backend.metrics() == "text"


async def test_the_router_reports_by_itself_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_LOADING_BEAT_S", 0.01)
    stage = Stage({"bf16": "ready"}, {"bf16": 100})
    stage.control.gone = True
    stage.router.open()
    await asyncio.sleep(0.03)
    assert not stage.router.ready()
    stage.control.gone = False
    async with asyncio.timeout(5):
        while not stage.router.ready():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await stage.router.close()


# What becomes of requests whose variant dies


@pytest.fixture
async def canary() -> AsyncIterator[Stage]:
    """Half of all go to int8, which has one replica."""
    stage = Stage({"bf16": "ready", "int8": "ready"}, {"bf16": 50, "int8": 50})
    stage.control.split = replace(stage.control.split, canary="int8", revision=3)
    stage.control.replicas = 1
    yield await stage.beat()
    await stage.router.close()


def int8_user(stage: Stage) -> str:
    return next(f"u{n}" for n in range(99) if assign(stage.control.split, f"u{n}", "").variant == "int8")


async def test_a_call_whose_canary_died_is_answered_by_the_stable_variant_and_says_so(canary: Stage) -> None:
    canary.links["int8"].script = [ReplicaDied("gone")]
    user = int8_user(canary)
    answer, events = await canary.ask(sticky_key=user)
    assert text(events) == "bf16 " * 3
    assert (answer.disclosure.variant, answer.disclosure.route) == ("bf16", "sticky")
    # The next one is not even sent there, and the controller learns of the death.
    answer, _ = await canary.ask(sticky_key=user)
    assert answer.disclosure.variant == "bf16"
    assert len(canary.links["int8"].asked) == 1
    await canary.beat()
    assert canary.control.deaths == {"int8": 1}
    by_variant = {(o.variant, o.error, o.held_out) for o in canary.control.outcomes.values()}
    assert by_variant == {("int8", "replica_died", False), ("bf16", None, True), ("bf16", None, False)}


async def test_all_prompts_of_a_call_move_together(canary: Stage) -> None:
    canary.links["int8"].script = [ReplicaDied("gone")] * 3
    answer, events = await canary.ask(prompts=3, sticky_key=int8_user(canary))
    assert answer.disclosure.variant == "bf16"
    assert text(events).split() == ["bf16"] * 9


async def test_a_request_that_waits_for_a_variant_that_crashes_is_set_free(canary: Stage) -> None:
    canary.links["int8"].stuck = True
    asked = asyncio.create_task(canary.ask(sticky_key=int8_user(canary)))
    while not canary.links["int8"].asked:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    canary.control.states["int8"] = "loading"
    await canary.beat()
    answer, events = await asked
    assert (answer.disclosure.variant, text(events)) == ("bf16", "bf16 " * 3)


async def test_a_pinned_request_waits_for_a_successor_but_not_for_ever(
    canary: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary.links["int8"].script = [ReplicaDied("gone")]
    asked = asyncio.create_task(canary.ask(pin="int8"))
    await asyncio.sleep(0.01)
    await canary.beat()
    answer, events = await asked
    assert (answer.disclosure.route, text(events)) == ("pinned", "int8 " * 3)
    monkeypatch.setattr(router_module, "_SUCCESSOR_S", 0.05)
    canary.links["int8"].script = [ReplicaDied("gone", retry_after_s=1)]
    _, events = await canary.ask(pin="int8")
    assert isinstance(events[0], Failure)
    assert isinstance(events[0].error, VariantUnavailable)
    assert events[0].error.retry_after_s == 1


async def test_a_controller_that_has_just_started_makes_nobody_absent(canary: Stage) -> None:
    canary.control.states = dict.fromkeys(canary.control.states, "loading")
    canary.control.is_young = True
    await canary.beat()
    assert text((await canary.ask(pin="int8"))[1]) == "int8 " * 3
    canary.control.is_young = False
    await canary.beat()
    with pytest.raises(VariantUnavailable):
        await canary.router.start(canary.call(pin="int8"))


async def test_evidence_that_was_not_written_down_is_sent_again(two: Stage) -> None:
    await two.ask()
    counted = two.control.ingress

    async def uncounted(beat: IngressBeat) -> View:
        return replace(await counted(beat), counted=False)

    two.control.ingress = uncounted  # type: ignore[method-assign]
    await two.beat()
    two.control.outcomes.clear()
    two.control.ingress = counted  # type: ignore[method-assign]
    for kept in (1, 0):
        two.control.outcomes.clear()
        await two.beat()
        assert len(two.control.outcomes) == kept


async def pairing(weights: Mapping[str, float], **states: State) -> Stage:
    made: dict[str, State] = {"bf16": "ready", "int8": "ready", **states}
    return await Stage(made, weights, drift=DriftSettings("bf16", 1.0)).beat()


async def counted(stage: Stage, name: str, *labels: str, least: float = 1.0) -> float:
    """What a metric has come to, once it has come that far."""
    async with asyncio.timeout(10):
        while True:
            await stage.beat()
            if (count := stage.control.counted(name, *labels)) >= least:
                return count
            await asyncio.sleep(0.001)


async def test_a_sampled_answer_is_read_by_the_reference_and_its_drift_follows_its_record() -> None:
    stage = await pairing({"bf16": 0, "int8": 100})
    await stage.ask()
    await counted(stage, "drift_samples_total", "int8", "scored")
    assert stage.links["bf16"].read == [("int8", "hidden", "variant")]
    (outcome,) = stage.control.outcomes.values()
    assert outcome.drift is not None
    assert (outcome.drift.tokens, outcome.drift.kl_max, outcome.drift.nonfinite_tokens) == (3, 0.03, 1)
    assert outcome.drift.kl_mean == pytest.approx(0.02)
    assert outcome.drift.flipped is None, "the answer was sampled"
    assert stage.control.counted("drift_tokens_total", "int8") == 3
    assert stage.control.counted("drift_nll_variant_nats_total", "int8") == 11.0
    await stage.router.close()


async def test_what_the_reference_served_is_read_by_another_and_counts_as_that_ones_drift() -> None:
    stage = await pairing({"bf16": 60, "int8": 40})
    while not stage.links["int8"].read:
        await stage.ask()
        await asyncio.sleep(0.01)
    assert stage.links["int8"].read[0] == ("bf16", "hidden", "reference")
    await counted(stage, "drift_samples_total", "int8", "scored")
    served = [outcome for outcome in stage.control.outcomes.values() if outcome.variant == "bf16" and outcome.reading]
    assert served[0].drift is None
    assert served[0].read_by == "int8"
    await stage.router.close()


@pytest.mark.parametrize(
    ("error", "result"),
    [(Overloaded("busy"), "shed"), (ReplicaDied("gone"), "no_data"), (GenerationFailed("broken"), "failed")],
)
async def test_a_reader_that_cannot_read_is_counted_and_nobody_notices(error: HalftoneError, result: str) -> None:
    stage = await pairing({"bf16": 0, "int8": 100})
    stage.links["bf16"].blind = error
    _, events = await stage.ask()
    assert text(events) == "int8 " * 3
    await counted(stage, "drift_samples_total", "int8", result)
    assert all(outcome.ok and outcome.drift is None for outcome in stage.control.outcomes.values())
    await stage.router.close()


async def test_without_a_reference_there_is_no_data_and_where_users_wait_scoring_is_shed() -> None:
    stage = await pairing({"bf16": 0, "int8": 100}, bf16="loading")
    await stage.ask()
    assert await counted(stage, "drift_samples_total", "int8", "no_data") == 1
    stage.control.states["bf16"], stage.control.waiting = "ready", 3
    await stage.beat()
    await stage.ask()
    assert await counted(stage, "drift_samples_total", "int8", "shed") == 1
    assert stage.links["bf16"].read == []
    await stage.router.close()


async def test_a_shadow_is_asked_beside_and_compared_and_the_client_sees_nothing_of_it(two: Stage) -> None:
    await two.router.set_traffic({"bf16": 100, "int8": 0}, {"int8": 1.0})
    answer, events = await two.ask()
    assert answer.disclosure.variant == "bf16"
    assert text(events) == "bf16 " * 3
    assert await counted(two, "shadow_requests_total", "int8", "compared") == 1
    served, shadow = sorted(two.control.outcomes.values(), key=lambda outcome: outcome.shadow)
    assert (shadow.variant, shadow.pair, shadow.agreed_tokens) == ("int8", served.record, 3)
    assert shadow.ok
    assert two.control.counted("generation_tokens_total", "int8") == 0, "nobody was served by it"


async def test_a_shadow_that_fails_or_finds_the_server_busy_is_only_counted(two: Stage) -> None:
    await two.router.set_traffic({"bf16": 100, "int8": 0}, {"int8": 1.0})
    two.links["int8"].script = [GenerationFailed("broken")]
    _, events = await two.ask()
    assert text(events) == "bf16 " * 3
    assert await counted(two, "shadow_requests_total", "int8", "failed") == 1
    two.control.waiting = 1
    await two.beat()
    await two.ask()
    assert await counted(two, "shadow_requests_total", "int8", "shed") == 1
    assert len(two.links["int8"].asked) == 1
