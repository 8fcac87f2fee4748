"""`/v1/chat/completions` as the official client and as plain HTTP see it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from serve.generation import Chat
from tests.api.conftest import Rim
from tests.api.scripted import ANSWER
from tests.api.test_completions import sse

STORY = "".join(ANSWER)
HELLO: Any = [{"role": "user", "content": "Hello there"}]


def test_a_chat_answer_is_what_the_official_client_expects(rim: Rim, openai: OpenAI) -> None:
    answer = openai.chat.completions.create(model="tale", messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == STORY
    assert answer.choices[0].logprobs is None
    assert answer.system_fingerprint == "f-bf16"
    request = rim.backend.calls[0].requests[0]
    assert request.prompt == Chat(messages=({"role": "user", "content": "Hello there"},))
    assert request.params.max_tokens is None
    assert not request.add_special_tokens


def test_text_parts_are_joined_and_names_kept(rim: Rim, openai: OpenAI) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    openai.chat.completions.create(model="tale", messages=[{"role": "user", "name": "ann", "content": parts}])  # type: ignore[list-item,misc]
    prompt = rim.backend.calls[0].requests[0].prompt
    assert isinstance(prompt, Chat)
    assert prompt.messages == ({"role": "user", "content": "one\ntwo", "name": "ann"},)


def test_max_completion_tokens_goes_before_max_tokens(rim: Rim, openai: OpenAI) -> None:
    openai.chat.completions.create(model="tale", messages=HELLO, max_tokens=9, max_completion_tokens=3)
    assert rim.backend.calls[0].requests[0].params.max_tokens == 3


def test_a_stream_opens_each_choice_with_its_role_and_ends_it_with_a_reason(http: httpx.Client) -> None:
    body = {"model": "tale", "messages": HELLO, "stream": True, "n": 2, "max_tokens": 2}
    *chunks, done = sse(http.post("/v1/chat/completions", json=body))
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["delta"]["content"] for choice in mine[1:]] == ANSWER[:2]
        assert [choice["finish_reason"] for choice in mine] == [None, None, "length"]


def test_logprobs_come_in_the_new_shape_streamed_or_not(openai: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tale", "messages": HELLO, "logprobs": True, "top_logprobs": 1}
    whole = openai.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    fox = whole.content[5]
    assert (fox.token, fox.logprob, bytes(fox.bytes or ())) == (" 🦊", -0.5, " 🦊".encode())
    assert [(other.token, other.logprob) for other in fox.top_logprobs] == [("~0", -1.0)]
    streamed: list[Any] = []
    for chunk in openai.chat.completions.create(**asked, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == whole.content


def test_the_clients_own_accumulator_understands_the_stream(openai: OpenAI) -> None:
    with openai.chat.completions.stream(model="tale", messages=HELLO, stream_options={"include_usage": True}) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == STORY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ANSWER)


async def test_the_async_client_chats_and_streams(rim: Rim) -> None:
    async with AsyncOpenAI(base_url=f"{rim.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model="tale", messages=HELLO)
        stream = await client.chat.completions.create(model="tale", messages=HELLO, stream=True)
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert said == answer.choices[0].message.content == STORY


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [*HELLO, {"role": 3, "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": HELLO * 5000}, "messages"),
        ({"messages": HELLO, "logprobs": 3}, "logprobs"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_completion_tokens": -1}, "max_completion_tokens"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": HELLO, "modalities": ["audio"]}, "modalities"),
        ({"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
        ({"messages": HELLO, "structured_outputs": {"regex": "(a+)+"}}, "structured_outputs"),
    ],
)
def test_what_is_wrong_is_named(rim: Rim, http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/v1/chat/completions", json={"model": "tale", **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert rim.backend.calls == []
    assert rim.backend.refusals == [400]


def test_tools_with_choice_none_are_answered_in_text(http: httpx.Client) -> None:
    body = {"model": "tale", "messages": HELLO, "tools": [{"type": "function"}], "tool_choice": "none"}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_media_is_refused_and_never_fetched(rim: Rim, http: httpx.Client, kind: str) -> None:
    url = f"{rim.url}/v1/models"
    part = {"type": kind, kind: {"url": url}}
    response = http.post(
        "/v1/chat/completions", json={"model": "tale", "messages": [{"role": "user", "content": [part]}]}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[0].type"
