"""Whatever an engine says arrives as it was, however the bytes are cut, and nothing but data can arrive."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import errors
from serve.errors import HalftoneError, InvalidRequest, Overloaded
from serve.generation import Delta, Event, Failure, PromptDelta, Timing, TokenLogprob
from serve.hop import Parcel
from serve.parcels import ParcelReader, pack

names = st.text(max_size=8)
ids = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)
seconds = st.floats(0, 1e4)
logprobs = st.builds(
    TokenLogprob, st.integers(0, 2**31), st.text(max_size=5), st.floats(-100, 0), st.just((240, 159)), st.integers(0, 9)
)
deltas = st.builds(
    Delta,
    names,
    st.integers(0, 9),
    st.text(max_size=20),
    ids,
    st.lists(logprobs, max_size=3).map(tuple),
    st.sampled_from([None, "stop", "length", "abort"]),
    st.one_of(st.none(), st.text(st.characters(), max_size=5), st.just("\ud83d"), st.integers(0, 2**31)),
    st.one_of(st.none(), st.builds(Timing, seconds, seconds, seconds, st.integers(0, 99))),
)
openings = st.builds(
    PromptDelta,
    names,
    ids,
    st.text(max_size=9),
    st.lists(st.none() | logprobs, max_size=3).map(tuple),
    st.integers(0, 2**31),
)
parcels = st.builds(Parcel, names, st.lists(deltas | openings, max_size=4).map(tuple))


@given(sent=st.lists(parcels, max_size=4), cuts=st.lists(st.integers(0, 2000), max_size=6))
def test_parcels_arrive_whole_and_in_order_however_the_bytes_are_cut(sent: list[Parcel], cuts: list[int]) -> None:
    data, reader, got = b"".join(map(pack, sent)), ParcelReader(), list[Parcel]()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in pairwise(edges):
        got += reader.feed(data[begin:end])
    assert got == sent


def arrived(event: Event) -> Any:
    (parcel,) = ParcelReader().feed(pack(Parcel("r", (event,))))
    return parcel.events[0]


@pytest.mark.parametrize(
    "error", [Overloaded("full", retry_after_s=2.5), InvalidRequest("no", param="prompt"), HalftoneError("x")]
)
def test_an_error_arrives_as_itself_with_all_that_it_holds(error: HalftoneError) -> None:
    got = arrived(Failure("a", error)).error
    assert (type(got), str(got), vars(got)) == (type(error), str(error), vars(error))


def test_every_error_of_the_tree_can_travel() -> None:
    for name in errors.__all__:
        error = getattr(errors, name).__new__(getattr(errors, name))
        error.__dict__.update(message="m")
        assert type(arrived(Failure("a", error)).error).__name__ == name


def test_a_number_that_is_none_stays_one() -> None:
    assert math.isnan(arrived(Delta("a", 0, "", (), (TokenLogprob(1, "x", math.nan),))).logprobs[0].logprob)


@pytest.mark.parametrize(
    "data", [pickle.dumps(Parcel("r", ())), msgpack.packb({"a": 1}), msgpack.packb(msgpack.ExtType(77, b"")), b"\xc1"]
)
def test_what_is_no_parcel_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError, TypeError)):
        list(ParcelReader().feed(data))
