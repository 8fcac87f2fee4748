"""`/v1/completions` as the official client and as plain HTTP see it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.api.conftest import Rim
from tests.api.scripted import ANSWER

STORY = "".join(ANSWER)


def sse(response: httpx.Response) -> list[Any]:
    """The data of every event; `[DONE]` as it is."""
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [data if (data := event[6:]) == "[DONE]" else json.loads(data) for event in events]


def test_a_completion_is_what_the_official_client_expects(openai: OpenAI) -> None:
    answer = openai.completions.create(model="tale", prompt="Tell me", max_tokens=50)
    assert answer.object == "text_completion"
    assert answer.system_fingerprint == "f-bf16"
    assert answer.choices[0].text == STORY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 7, 9)


def test_the_headers_say_who_answered(rim: Rim, openai: OpenAI) -> None:
    raw = openai.completions.with_raw_response.create(
        model="tale", prompt="Hi", extra_headers={"x-halftone-variant": "bf16"}
    )
    assert raw.headers["x-halftone-variant"] == "bf16"
    assert raw.headers["x-halftone-precision"] == "bf16"
    assert raw.headers["x-halftone-route"] == "pinned"
    assert raw.headers["x-request-id"] == raw.parse().id
    assert rim.backend.calls[0].pin == "bf16"


def test_sixteen_tokens_are_the_default_and_an_absent_seed_differs_by_call(rim: Rim, openai: OpenAI) -> None:
    openai.completions.create(model="tale", prompt=["a", "b"])
    first, second = rim.backend.calls[0].requests
    assert first.params.max_tokens == 16
    assert first.params.seed != second.params.seed


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([3, 1, 4], [(3, 1, 4)]),
        ([[3, 1], [4]], [(3, 1), (4,)]),
    ],
)
def test_every_shape_of_prompt_becomes_one_request_each(
    rim: Rim, openai: OpenAI, prompt: Any, prompts: list[Any]
) -> None:
    answer = openai.completions.create(model="tale", prompt=prompt, n=2)
    assert [request.prompt for request in rim.backend.calls[0].requests] == prompts
    assert [choice.index for choice in answer.choices] == list(range(2 * len(prompts)))
    assert all(choice.text == STORY for choice in answer.choices)


def test_extensions_reach_the_engine_as_vllm_means_them(rim: Rim, http: httpx.Client) -> None:
    body = {
        "model": "tale", "prompt": "Hi", "temperature": 0, "top_k": -1, "min_p": 0.1, "min_tokens": 2, "seed": 5,
        "repetition_penalty": 1.2, "stop": "x", "stop_token_ids": [7], "ignore_eos": True, "logit_bias": {"5": -100},
        "include_stop_str_in_output": True, "skip_special_tokens": False, "add_special_tokens": False,
        "presence_penalty": 1, "frequency_penalty": -1, "top_p": 0.5, "max_tokens": 3, "unheard_of": {"a": [1]},
    }  # fmt: skip
    assert http.post("/v1/completions", json=body).status_code == 200
    request = rim.backend.calls[0].requests[0]
    params = request.params
    assert not request.add_special_tokens
    assert (params.temperature, params.top_k, params.min_p, params.min_tokens, params.seed) == (0.0, 0, 0.1, 2, 5)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 1.0, -1.0)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("x",), (7,), {5: -100.0})
    assert params.ignore_eos
    assert params.include_stop_str_in_output
    assert not params.skip_special_tokens


def test_null_means_absent(rim: Rim, http: httpx.Client) -> None:
    nulls = dict.fromkeys(
        ("n", "best_of", "stream", "stream_options", "temperature", "top_p", "top_k", "logprobs", "echo", "stop",
         "seed", "stop_token_ids", "logit_bias", "max_tokens", "user", "suffix", "min_tokens", "skip_special_tokens")
    )  # fmt: skip
    assert http.post("/v1/completions", json={"model": "tale", "prompt": "Hi", **nulls}).status_code == 200
    params = rim.backend.calls[0].requests[0].params
    assert (params.temperature, params.max_tokens, params.skip_special_tokens) == (1.0, 16, True)


def test_echo_and_logprobs_with_no_new_token_score_the_prompt(openai: OpenAI) -> None:
    choice = openai.completions.create(model="tale", prompt="the red fox", max_tokens=0, echo=True, logprobs=2).choices[
        0
    ]
    assert choice.text == "the red fox"
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["the", " red", " fox"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 3, 7]
    assert choice.logprobs.top_logprobs == [
        None,
        {"~0": -1.0, "~1": -2.0, " red": -0.5},
        {"~0": -1.0, "~1": -2.0, " fox": -0.5},
    ]


def test_logprobs_of_prompt_and_answer_are_one_list(openai: OpenAI) -> None:
    choice = openai.completions.create(model="tale", prompt="the fox", max_tokens=2, echo=True, logprobs=0).choices[0]
    assert choice.text == "the foxOnce upon"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["the", " fox", "Once", " upon"]
    assert choice.logprobs.text_offset == [0, 3, 7, 11]


def test_echo_spells_token_ids(openai: OpenAI) -> None:
    answer = openai.completions.create(model="tale", prompt=[2, 1], max_tokens=1, echo=True)
    assert answer.choices[0].text == "xxxOnce"


def test_prompt_logprobs_and_token_ids_come_as_in_vllm(http: httpx.Client) -> None:
    body = {"model": "tale", "prompt": "the fox", "max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["prompt_token_ids"] == [3, 4]
    assert choice["token_ids"] == [4]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "4": {"logprob": -0.5, "rank": 1, "decoded_token": " fox"},
            "100": {"logprob": -1.0, "rank": 2, "decoded_token": "~0"},
        },
    ]


def test_a_stream_says_what_the_whole_answer_says(openai: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tale", "prompt": ["a b", "c"], "n": 2, "logprobs": 1, "echo": True}
    whole = openai.completions.create(**asked)
    texts, tokens = [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    offsets, reasons = [[] for _ in range(4)], [None] * 4  # type: ignore[var-annotated]
    for chunk in openai.completions.create(**asked, stream=True):
        assert chunk.system_fingerprint == "f-bf16"
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        assert choice.logprobs is not None
        tokens[choice.index] += choice.logprobs.tokens or []
        offsets[choice.index] += choice.logprobs.text_offset or []
        reasons[choice.index] = choice.finish_reason  # type: ignore[call-overload]
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs and choice.logprobs.tokens for choice in whole.choices]
    assert offsets == [choice.logprobs and choice.logprobs.text_offset for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_the_last_chunk_before_done_is_the_usage_when_asked_for(http: httpx.Client) -> None:
    body = {"model": "tale", "prompt": "Hi", "stream": True, "stream_options": {"include_usage": True}}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = sse(response)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 7
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {response.headers["x-request-id"]}


def test_continuous_usage_counts_up(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "tale", "prompt": "Hi you", "stream": True, "stream_options": options}
    *chunks, _ = sse(http.post("/v1/completions", json=body))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks)


def test_without_being_asked_a_stream_carries_no_usage(http: httpx.Client) -> None:
    *chunks, done = sse(http.post("/v1/completions", json={"model": "tale", "prompt": "Hi", "stream": True}))
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks)


async def test_the_async_client_streams_too(rim: Rim) -> None:
    async with AsyncOpenAI(base_url=f"{rim.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(model="tale", prompt="Hi", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == STORY


@pytest.mark.parametrize(("header", "user", "key"), [(None, "ann", "ann"), ("bob", "ann", "ann"), ("bob", None, None)])
def test_the_user_field_is_the_sticky_key(
    rim: Rim, http: httpx.Client, header: str | None, user: str | None, key: str | None
) -> None:
    headers = {"x-halftone-sticky-key": header} if header else {}
    http.post("/v1/completions", json={"model": "tale", "prompt": "Hi", "user": user}, headers=headers)
    assert rim.backend.calls[0].sticky_key == key
