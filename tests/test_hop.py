"""Tokens cross the hop once per step, in order, whole, and every stream ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import GenerationFailed
from serve.generation import Delta, Event, Failure, GenerationRequest, PromptDelta, SamplingParams
from serve.hop import Inbox, Mailbox, Outbox, Parcel, fold


def request(name: str, n: int = 1) -> GenerationRequest:
    return GenerationRequest(name, "", SamplingParams(), n=n)


def delta(name: str, text: str, *, choice: int = 0, last: bool = False) -> Delta:
    return Delta(name, choice, text, (ord(text[0]),) if text else (), finish_reason="length" if last else None)


def steps(names: list[str], length: int) -> list[list[Event]]:
    """What an engine makes of requests that all run at once, the later ones one token longer each."""
    made: list[list[Event]] = [[PromptDelta(name, (1, 2)) for name in names]]
    for position in range(length + len(names)):
        made.append(
            [
                delta(name, f"{position},", last=position == length + index - 1)
                for index, name in enumerate(names)
                if position < length + index
            ]
        )
    return made


async def ride(stream: AsyncIterator[Parcel], seen: list[Parcel]) -> None:
    async for parcel in stream:
        seen.append(parcel)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def read(mailbox: Mailbox) -> list[Event]:
    events = []
    while (event := await mailbox.take()) is not None:
        events.append(event)
    return events


async def test_one_parcel_per_step_whatever_the_number_of_streams() -> None:
    names = [f"r{index}" for index in range(20)]
    outbox = Outbox("replica", "ingress.0")
    seen: list[Parcel] = []
    for name in names:
        outbox.open(request(name))
    riders = [asyncio.create_task(ride(outbox.carry(name), seen)) for name in names]
    await asyncio.sleep(0)
    made = steps(names, length=5)
    for events in made:
        outbox.put(events)
        for _ in range(5):
            await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(*riders), 5)
    assert [parcel.number for parcel in seen] == list(range(len([events for events in made if events])))
    assert [event for parcel in seen for event in parcel.events] == [event for events in made for event in events]


async def test_a_hop_that_is_slow_packs_more_steps_into_one_parcel() -> None:
    outbox = Outbox("replica", "ingress.0")
    outbox.open(request("a"))
    stream = outbox.carry("a")
    for events in steps(["a"], length=6):
        outbox.put(events)
    seen = [parcel async for parcel in stream]
    assert len(seen) == 1
    assert text_of(list(seen[0].events)) == "0,1,2,3,4,5,"


async def test_the_next_oldest_stream_carries_once_the_first_has_ended() -> None:
    outbox = Outbox("replica", "ingress.0")
    first: list[Parcel] = []
    second: list[Parcel] = []
    for name in ("a", "b"):
        outbox.open(request(name))
    riders = [asyncio.create_task(ride(outbox.carry("a"), first)), asyncio.create_task(ride(outbox.carry("b"), second))]
    await asyncio.sleep(0)
    outbox.put([delta("a", "x", last=True), delta("b", "1")])
    await riders[0]
    outbox.put([delta("b", "2", last=True)])
    await riders[1]
    assert [parcel.number for parcel in first] == [0]
    assert [parcel.number for parcel in second] == [1]


async def test_closing_a_request_ends_its_stream_and_drops_what_waits_of_it() -> None:
    outbox = Outbox("replica", "ingress.0")
    seen: list[Parcel] = []
    for name in ("a", "b"):
        outbox.open(request(name))
    outbox.put([delta("a", "x"), delta("b", "1")])
    outbox.close("a")
    await ride(outbox.carry("a"), seen)
    assert seen == []
    rider = asyncio.create_task(ride(outbox.carry("b"), seen))
    await asyncio.sleep(0)
    outbox.put([delta("a", "y"), delta("b", "2", last=True)])
    await rider
    assert text_of([event for parcel in seen for event in parcel.events]) == "12"


async def test_a_failure_ends_a_request_with_choices_left() -> None:
    outbox = Outbox("replica", "ingress.0")
    outbox.open(request("a", n=3))
    outbox.put([delta("a", "x"), Failure("a", GenerationFailed("broken"))])
    assert [type(event) for parcel in [p async for p in outbox.carry("a")] for event in parcel.events] == [
        Delta,
        Failure,
    ]


@given(data=st.data(), count=st.integers(1, 6), length=st.integers(1, 6))
def test_whatever_order_parcels_come_in_every_answer_is_whole(data: st.DataObject, count: int, length: int) -> None:
    names = [f"r{index}" for index in range(count)]
    made = [events for events in steps(names, length) if events]
    parcels = [Parcel("replica", "ingress.0", number, tuple(events)) for number, events in enumerate(made)]
    parcels += data.draw(st.lists(st.sampled_from(parcels), max_size=3))
    asyncio.run(_delivered_whole(names, length, data.draw(st.permutations(parcels))))


async def _delivered_whole(names: list[str], length: int, parcels: list[Parcel]) -> None:
    inbox = Inbox("ingress")
    observed: list[Event] = []
    mailboxes = {name: Mailbox([request(name)], observed.append) for name in names}
    for name, mailbox in mailboxes.items():
        inbox.open(name, mailbox)
    for parcel in parcels:
        inbox.accept(parcel)
    for index, name in enumerate(names):
        events = await asyncio.wait_for(read(mailboxes[name]), 5)
        assert isinstance(events[0], PromptDelta)
        assert text_of(events) == "".join(f"{position}," for position in range(length + index))


@given(
    schedule=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["join", "step", "yield", "leave"])), max_size=60),
)
def test_streams_that_come_and_go_lose_nothing_of_those_that_stay(schedule: list[tuple[int, str]]) -> None:
    asyncio.run(asyncio.wait_for(_come_and_go(schedule), 10))


async def _come_and_go(schedule: list[tuple[int, str]]) -> None:
    """Four requests join, get tokens and are given up at random; in the end the rest is finished."""
    outbox = Outbox("replica", "ingress.0")
    inbox = Inbox("ingress")
    sent: dict[str, str] = {}
    boxes: dict[str, Mailbox] = {}
    riders: dict[str, asyncio.Task[None]] = {}

    async def deliver(name: str) -> None:
        async for parcel in outbox.carry(name):
            inbox.accept(parcel)

    for step, (number, act) in enumerate(schedule):
        name = f"r{number}"
        if act == "join" and name not in sent:
            sent[name], boxes[name] = "", Mailbox([request(name)], lambda event: None)
            inbox.open(name, boxes[name])
            outbox.open(request(name))
            riders[name] = asyncio.create_task(deliver(name))
        elif act == "step" and name in riders:
            sent[name] += f"{step},"
            outbox.put([delta(name, f"{step},")])
        elif act == "yield":
            await asyncio.sleep(0)
        elif act == "leave" and name in riders:
            outbox.close(name)
            await riders.pop(name)
    for name in riders:
        outbox.put([delta(name, ".", last=True)])
    await asyncio.gather(*riders.values())
    for name in riders:
        assert text_of(await read(boxes[name])) == sent[name] + "."


async def test_behind_a_lost_parcel_nothing_is_delivered_and_a_new_channel_counts_afresh() -> None:
    inbox = Inbox("ingress")
    box = Mailbox([request("a")], lambda event: None)
    inbox.open("a", box)
    inbox.accept(Parcel("replica", inbox.channel, 1, (delta("a", "x", last=True),)))
    assert box.unfinished == {"a"}
    inbox.fail("a", GenerationFailed("lost"))
    assert isinstance((await read(box))[0], Failure)
    inbox.renew()
    again = Mailbox([request("b")], lambda event: None)
    inbox.open("b", again)
    inbox.accept(Parcel("replica", inbox.channel, 0, (delta("b", "y", last=True),)))
    assert text_of(await read(again)) == "y"


async def test_a_request_that_begins_again_elsewhere_hears_nothing_more_of_the_first_replica() -> None:
    inbox = Inbox("ingress")
    box = Mailbox([request("a")], lambda event: None)
    inbox.open("a", box)
    inbox.accept(Parcel("first", "ingress.0", 0, (PromptDelta("a", (1,)),)))
    inbox.reassign("a")
    inbox.accept(Parcel("first", "ingress.0", 1, (delta("a", "stale", last=True),)))
    inbox.accept(Parcel("second", "ingress.0", 0, (PromptDelta("a", (1,)), delta("a", "fresh", last=True))))
    events = await read(box)
    assert [type(event) for event in events] == [PromptDelta, Delta]
    assert text_of(events) == "fresh"


async def test_a_reader_that_sleeps_costs_one_event_per_choice() -> None:
    observed: list[Event] = []
    box = Mailbox([request("a", n=2)], observed.append)
    for position in range(5000):
        box.put(delta("a", f"{position},", choice=position % 2))
    assert len(observed) == 5000
    assert len(box._events) < 300
    box.put(delta("a", "", choice=0, last=True))
    box.put(delta("a", "", choice=1, last=True))
    events = await read(box)
    for choice in (0, 1):
        mine = [event for event in events if isinstance(event, Delta) and event.choice_index == choice]
        assert text_of(list(mine)) == "".join(f"{position}," for position in range(choice, 5000, 2))
        assert mine[-1].finish_reason == "length"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.text(max_size=3)), max_size=30))
def test_folding_keeps_the_text_of_every_choice(entries: list[tuple[str, int, str]]) -> None:
    events: list[Event] = [delta(name, text, choice=choice) for name, choice, text in entries]
    folded = fold([PromptDelta("a", ()), *events])
    assert isinstance(folded[0], PromptDelta)
    assert len(folded) <= 7
    for key in {(name, choice) for name, choice, _ in entries}:
        whole, parts = of_choice(key, events), of_choice(key, folded)
        assert text_of(parts) == text_of(whole)


def of_choice(key: tuple[str, int], events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, Delta) and (event.request_id, event.choice_index) == key]


@pytest.mark.parametrize("late", [delta("a", "late"), Failure("a", GenerationFailed("late"))])
async def test_after_the_end_nothing_more_is_read(late: Event) -> None:
    box = Mailbox([request("a")], lambda event: None)
    box.put(delta("a", "x", last=True))
    box.put(late)
    assert len(await read(box)) == 1
