"""A stream means the same however it was written and however it travelled."""

import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.client import Exchange
from loadtest.record import Capture, read
from loadtest.sse import split

ENDINGS = st.sampled_from([b"\n", b"\r\n", b"\r"])
TEXTS = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1, max_size=8)


def event(text):
    return json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False).encode()


@given(st.lists(TEXTS), ENDINGS, st.sampled_from([b"data: ", b"data:"]), st.booleans())
def test_every_line_ending_and_every_comment_gives_the_same_events(texts, ending, prefix, with_comments):
    comment = b": ping" + ending + ending if with_comments else b""
    body = b"".join(comment + prefix + event(text) + ending + ending for text in texts)
    stream = split(body)
    assert [one.data for one in stream.events] == [event(text) for text in texts]
    assert stream.tail == b""
    assert stream.stray_lines == 0
    if texts:
        assert stream.events[-1].end == len(body)


def test_lines_of_one_event_are_joined_and_other_fields_are_no_data():
    stream = split(b"event: token\nid: 7\ndata: one\ndata: two\nretry: 10\n\n")
    assert [one.data for one in stream.events] == [b"one\ntwo"]
    assert stream.stray_lines == 0


def test_what_is_no_field_is_counted_and_an_unfinished_event_is_the_tail():
    stream = split(b"Traceback:\nboom\n\ndata: unfinished")
    assert stream.events == []
    assert stream.stray_lines == 2
    assert stream.tail == b"unfinished"


@given(st.lists(TEXTS, min_size=1, max_size=8), st.data())
def test_a_chunk_counts_from_the_read_that_completed_it(texts, data):
    parts = [b"data: " + event(text) + b"\n\n" for text in texts] + [b"data: [DONE]\n\n"]
    body = b"".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=12)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    exchange = Exchange(started_s=0.0, sent_s=0.0, ended_s=99.0, status=200)
    exchange.times_s = array("d", (float(number) for number in range(len(lengths))))
    exchange.lengths = array("L", lengths)
    exchange.body = bytearray(body)
    record = read(capture_of(exchange), 0.0)
    assert record.ok
    assert record.text == "".join(texts)
    ends = [sum(len(part) for part in parts[: number + 1]) for number in range(len(texts))]
    expected = [next(k for k in range(len(lengths)) if sum(lengths[: k + 1]) >= end) for end in ends]
    assert list(record.chunks_s) == expected


@given(st.binary(max_size=200))
def test_no_bytes_at_all_make_it_raise(body):
    exchange = Exchange(started_s=0.0, sent_s=0.0, ended_s=1.0, status=200)
    exchange.times_s, exchange.lengths, exchange.body = array("d", [0.5]), array("L", [len(body)]), bytearray(body)
    for streamed in (True, False):
        assert read(capture_of(exchange, streamed), 0.0).error in ("cut", "malformed", "server_error")


def test_json_nested_without_end_is_malformed():
    exchange = Exchange(started_s=0.0, sent_s=0.0, ended_s=1.0, status=200)
    exchange.body = bytearray(b"[" * 200_000)
    assert read(capture_of(exchange, streamed=False), 0.0).error == "malformed"


@pytest.mark.parametrize(
    ("chunk", "text"),
    [
        ({"choices": [{"text": "a"}]}, "a"),
        ({"choices": [{"delta": {"content": "a"}}]}, "a"),
        ({"choices": [{"delta": {"reasoning_content": "a"}}]}, "a"),
        ({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "a"}}]}}]}, "a"),
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, ""),
        ({"choices": [{"delta": {"content": None}}]}, ""),
        ({"choices": [], "usage": {"completion_tokens": 3}}, ""),
    ],
)
def test_a_token_is_a_chunk_with_text_whatever_the_server_calls_it(chunk, text):
    body = b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
    exchange = Exchange(started_s=0.0, sent_s=0.0, ended_s=1.0, status=200)
    exchange.times_s, exchange.lengths, exchange.body = array("d", [0.5]), array("L", [len(body)]), bytearray(body)
    record = read(capture_of(exchange), 0.0)
    assert record.ok
    assert record.text == text
    assert list(record.chunks_s) == ([0.5] if text else [])


def capture_of(exchange, streamed=True):
    return Capture(0, 0, 0.0, False, 1, 0, streamed, exchange)
