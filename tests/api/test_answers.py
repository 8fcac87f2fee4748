"""Chunks and whole answers say the same, whatever the engine's events are; log-probabilities keep their shapes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.api.answers import Plan, Transcript, body, chunks
from serve.api.answers.logprobs import LegacyLogprobs, chat_logprobs, prompt_logprobs
from serve.api.backend import Call
from serve.api.schema.sampling import CallKind
from serve.errors import GenerationFailed
from serve.generation import Delta, Disclosure, GenerationRequest, PromptDelta, SamplingParams, TokenLogprob

WHO = Disclosure("bf16", "bf16", "weighted", "f")
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=5)
TOKENS = st.builds(
    lambda text, logprob: TokenLogprob(1, text, logprob, tuple(text.encode()), 1, (TokenLogprob(2, "~", -2.0),)),
    TEXT,
    st.floats(max_value=0, allow_nan=False),
)
REASONS = st.sampled_from(["stop", "length"])


@st.composite
def calls(draw: st.DrawFn, kind: CallKind) -> tuple[Plan, list[PromptDelta | Delta]]:
    """A plan and the interleaved events of its answer: prompts first, then choices in any order."""
    prompts = draw(st.integers(1, 3)) if kind == "cmpl" else 1
    choices = draw(st.integers(1, 3))
    logprobs = draw(st.sampled_from([None, 0, 1]))
    params = SamplingParams(logprobs=logprobs)
    requests = tuple(GenerationRequest(f"r{index}", f"p{index}", params, choices) for index in range(prompts))
    plan = Plan(
        "id", kind, Call("tale", requests),
        echo=kind == "cmpl" and draw(st.booleans()),
        return_token_ids=draw(st.booleans()),
        include_usage=True,
        continuous_usage=draw(st.booleans()),
    )  # fmt: skip
    events: list[PromptDelta | Delta] = [
        PromptDelta(request.request_id, (1, 2), draw(TEXT), (None, draw(TOKENS))) for request in requests
    ]
    ends = draw(st.permutations([(request.request_id, choice) for request in requests for choice in range(choices)]))
    for request_id, choice in draw(st.lists(st.sampled_from(ends), max_size=10)):
        events.append(draw(deltas(request_id, choice, logprobs)))
    return plan, events + [draw(deltas(*end, logprobs, draw(REASONS))) for end in ends]


@st.composite
def deltas(draw: st.DrawFn, request_id: str, choice: int, logprobs: int | None, reason: Any = None) -> Delta:
    said = draw(st.lists(TOKENS, max_size=2)) if logprobs is not None else []
    ids = tuple(draw(st.lists(st.integers(0, 9), max_size=2)))
    stop = draw(st.sampled_from([None, 7, "END"])) if reason else None
    return Delta(request_id, choice, draw(TEXT), ids, tuple(said), reason, stop)


def whole(plan: Plan, events: list[PromptDelta | Delta]) -> dict[str, Any]:
    transcript = Transcript(plan)
    for event in events:
        transcript.add(event)
    return json.loads(json.dumps(body(plan, WHO, transcript), allow_nan=False))  # type: ignore[no-any-return]


def streamed(plan: Plan, events: list[PromptDelta | Delta]) -> list[dict[str, Any]]:
    writer = chunks(plan, WHO)
    parts = (writer.write(events) + writer.end()).split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def joined(kind: CallKind, mine: list[dict[str, Any]]) -> dict[str, Any]:
    """The chunks of one choice put together again as the whole choice would be."""
    texts = [choice["delta"].get("content", "") if kind == "chatcmpl" else choice["text"] for choice in mine]
    logprobs = [choice["logprobs"] for choice in mine if choice["logprobs"] is not None]
    keys = ("content",) if kind == "chatcmpl" else ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {
        "text": "".join(texts),
        "logprobs": {key: [item for part in logprobs for item in part[key]] for key in keys} if logprobs else None,
        "token_ids": [token_id for choice in mine for token_id in choice.get("token_ids", [])],
        "finish_reason": mine[-1]["finish_reason"],
        "stop_reason": mine[-1]["stop_reason"],
    }


@pytest.mark.parametrize("kind", ["cmpl", "chatcmpl"])
@given(data=st.data())
def test_the_stream_put_together_is_the_whole_answer(kind: CallKind, data: st.DataObject) -> None:
    plan, events = data.draw(calls(kind))
    answer, stream = whole(plan, events), streamed(plan, events)
    assert stream[-1]["usage"] == answer["usage"]
    assert stream[-1]["choices"] == []
    for choice in answer["choices"]:
        mine = [chunk["choices"][0] for chunk in stream[:-1] if chunk["choices"][0]["index"] == choice["index"]]
        together = joined(kind, mine)
        text = choice["message"]["content"] if kind == "chatcmpl" else choice["text"]
        assert together["text"] == text
        assert together["finish_reason"] == choice["finish_reason"]
        assert together["stop_reason"] == choice["stop_reason"]
        assert together["token_ids"] == choice.get("token_ids", [])
        assert all(part["finish_reason"] is None for part in mine[:-1])
        for key, items in (together["logprobs"] or {}).items():
            assert items == choice["logprobs"][key]


def test_an_answer_that_lacks_an_end_is_never_written() -> None:
    plan = Plan("id", "cmpl", Call("tale", (GenerationRequest("r", "p", SamplingParams(), 2),)))
    events = [PromptDelta("r", (1,)), Delta("r", 0, "x", (1,), (), "stop")]
    with pytest.raises(GenerationFailed):
        whole(plan, events)
    with pytest.raises(GenerationFailed):
        streamed(plan, events)


def test_a_character_in_pieces_has_distinct_names_and_counts_once() -> None:
    pieces = [
        TokenLogprob(1, "�", -1.0, (0xF0, 0x9F)),
        TokenLogprob(2, "�", -1.0, (0xA6, 0x8A)),
        TokenLogprob(3, "!", -1.0, (33,)),
    ]
    lists = LegacyLogprobs(0).output(pieces)
    assert lists["tokens"] == ["bytes:\\xf0\\x9f", "bytes:\\xa6\\x8a", "!"]
    assert lists["text_offset"] == [0, 1, 1]


@pytest.mark.parametrize(("text", "pieces", "first", "offsets"), [
    ("the fox", ["?", " fox"], "the", [0, 3]),
    ("the fox", ["?", "the", " fox"], "", [0, 0, 3]),
    ("the fox", ["?", " the", " fox"], "", [0, 0, 4]),
    ("x", ["?"], "x", [0]),
])  # fmt: skip
def test_the_first_prompt_token_is_what_the_others_leave(
    text: str, pieces: list[str], first: str, offsets: list[int]
) -> None:
    rest = [TokenLogprob(1, piece, -1.0, tuple(piece.encode())) for piece in pieces[1:]]
    lists = LegacyLogprobs(0).prompt(PromptDelta("r", (1,), "", (None, *rest)), text)
    assert lists["tokens"][0] == first
    assert lists["text_offset"] == offsets


def test_infinite_logprobs_become_numbers_that_json_has() -> None:
    token = TokenLogprob(1, "a", -math.inf, (97,), 1)
    for shape in (LegacyLogprobs(0).output([token]), chat_logprobs([token]), prompt_logprobs([token])):
        assert "-9999.0" in json.dumps(shape, allow_nan=False)
