"""Tokens cross the hop once per step, in order, whole, and every request ends."""

from __future__ import annotations

import asyncio

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


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def read(mailbox: Mailbox) -> list[Event]:
    events = []
    while (event := await mailbox.take()) is not None:
        events.append(event)
    return events


async def test_one_parcel_per_step_whatever_the_number_of_requests() -> None:
    names = [f"r{index}" for index in range(20)]
    outbox, seen = Outbox("replica"), list[Parcel]()
    outbox.lead(seen.append)
    for name in names:
        outbox.open(request(name))
    ends = [asyncio.create_task(outbox.ended(name)) for name in names]
    made = steps(names, length=5)
    for events in made:
        outbox.put(events)
    await asyncio.wait_for(asyncio.gather(*ends), 5)
    assert [list(parcel.events) for parcel in seen] == [events for events in made if events]


async def test_a_way_that_is_full_packs_more_steps_into_one_parcel() -> None:
    outbox, seen = Outbox("replica"), list[Parcel]()
    outbox.open(request("a"))
    for events in steps(["a"], length=6):
        outbox.put(events)
    outbox.lead(seen.append)
    await asyncio.wait_for(outbox.ended("a"), 5)
    assert len(seen) == 1
    assert text_of(list(seen[0].events)) == "0,1,2,3,4,5,"


async def test_closing_a_request_ends_it_and_drops_what_waits_of_it() -> None:
    outbox, seen = Outbox("replica"), list[Parcel]()
    for name in ("a", "b"):
        outbox.open(request(name))
    outbox.put([delta("a", "x"), delta("b", "1")])
    outbox.close("a")
    await asyncio.wait_for(outbox.ended("a"), 5)
    outbox.lead(seen.append)
    outbox.put([delta("a", "y"), delta("b", "2", last=True)])
    await asyncio.wait_for(outbox.ended("b"), 5)
    assert text_of([event for parcel in seen for event in parcel.events]) == "12"


async def test_a_failure_ends_a_request_with_choices_left() -> None:
    outbox, seen = Outbox("replica"), list[Parcel]()
    outbox.lead(seen.append)
    outbox.open(request("a", n=3))
    outbox.put([delta("a", "x"), Failure("a", GenerationFailed("broken"))])
    await asyncio.wait_for(outbox.ended("a"), 5)
    assert [type(event) for parcel in seen for event in parcel.events] == [Delta, Failure]


async def test_a_way_that_breaks_ends_all_that_is_open_with_the_reason() -> None:
    outbox = Outbox("replica")
    for name in ("a", "b"):
        outbox.open(request(name))
    outbox.put([delta("a", "x")])
    outbox.fail(GenerationFailed("broken"))
    for name in ("a", "b"):
        with pytest.raises(GenerationFailed, match="broken"):
            await asyncio.wait_for(outbox.ended(name), 5)


@given(schedule=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["join", "step", "shut", "lead", "leave"]))))
def test_requests_that_come_and_go_lose_nothing_of_those_that_stay(schedule: list[tuple[int, str]]) -> None:
    asyncio.run(asyncio.wait_for(_come_and_go(schedule), 10))


async def _come_and_go(schedule: list[tuple[int, str]]) -> None:
    """Four requests join, get tokens and are given up at random, the way opens and shuts; in the end the rest is
    finished."""
    outbox, inbox = Outbox("replica"), Inbox()
    sent: dict[str, str] = {}
    boxes: dict[str, Mailbox] = {}
    ends: dict[str, asyncio.Task[None]] = {}
    for step, (number, act) in enumerate(schedule):
        name = f"r{number}"
        if act == "join" and name not in sent:
            sent[name], boxes[name] = "", Mailbox([request(name)], lambda event: None)
            inbox.open(name, boxes[name])
            outbox.open(request(name))
            ends[name] = asyncio.create_task(outbox.ended(name))
        elif act == "step" and name in ends:
            sent[name] += f"{step},"
            outbox.put([delta(name, f"{step},")])
        elif act == "shut":
            outbox.shut()
        elif act == "lead":
            outbox.lead(inbox.accept)
        elif act == "leave" and name in ends:
            outbox.close(name)
            await ends.pop(name)
    outbox.lead(inbox.accept)
    for name in ends:
        outbox.put([delta(name, ".", last=True)])
    await asyncio.gather(*ends.values())
    for name in ends:
        assert text_of(await read(boxes[name])) == sent[name] + "."


async def test_a_request_that_begins_again_elsewhere_hears_nothing_more_of_the_first_replica() -> None:
    inbox = Inbox()
    box = Mailbox([request("a")], lambda event: None)
    inbox.open("a", box)
    inbox.accept(Parcel("first", (PromptDelta("a", (1,)),)))
    inbox.reassign("a")
    inbox.accept(Parcel("first", (delta("a", "stale", last=True),)))
    inbox.accept(Parcel("second", (PromptDelta("a", (1,)), delta("a", "fresh", last=True))))
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
