"""Every failure is OpenAI-shaped JSON that names the field, and a canonical request still answers afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai as client_errors
import pytest
from openai import OpenAI

from serve.errors import (
    CheckpointError,
    ContextLengthExceeded,
    GenerationFailed,
    HalftoneError,
    InvalidRequest,
    Overloaded,
    VariantUnavailable,
)
from serve.generation import Delta, Event, GenerationRequest, PromptDelta
from tests.api.conftest import Rim
from tests.api.scripted import ANSWER, failure, story
from tests.api.test_completions import sse


@pytest.fixture(autouse=True)
def still_alive(rim: Rim, http: httpx.Client) -> Iterator[None]:
    yield
    rim.backend.reset()
    answer = http.post("/v1/completions", json={"model": "tale", "prompt": "Hi"})
    assert answer.json()["choices"][0]["text"] == "".join(ANSWER)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert "/serve/" not in response.text
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("model", None, "model"),
        ("model", 3, "model"),
        ("model", "", "model"),
        ("model", "x" * 1000, "model"),
        ("prompt", None, "prompt"),
        ("prompt", "", "prompt"),
        ("prompt", [], "prompt"),
        ("prompt", [[]], "prompt[0]"),
        ("prompt", ["a", ""], "prompt[1]"),
        ("prompt", ["a", 1], "prompt[1]"),
        ("prompt", [1, "a"], "prompt[1]"),
        ("prompt", [1, -1], "prompt[1]"),
        ("prompt", [1.0], "prompt[0]"),
        ("prompt", [True], "prompt[0]"),
        ("prompt", [2**40], "prompt[0]"),
        ("prompt", [[1], [2.5]], "prompt[1][0]"),
        ("prompt", "a\0b", "prompt"),
        ("prompt", {"a": 1}, "prompt"),
        ("n", 0, "n"),
        ("n", "3", "n"),
        ("n", 2.0, "n"),
        ("n", True, "n"),
        ("n", 10**9, "n"),
        ("best_of", 10**9, "best_of"),
        ("best_of", 2, "best_of"),
        ("max_tokens", -1, "max_tokens"),
        ("max_tokens", 10**30, "max_tokens"),
        ("max_tokens", "16", "max_tokens"),
        ("min_tokens", 17, "min_tokens"),
        ("temperature", -0.1, "temperature"),
        ("temperature", 2.1, "temperature"),
        ("temperature", 10**400, "temperature"),
        ("temperature", True, "temperature"),
        ("temperature", "hot", "temperature"),
        ("top_p", 0, "top_p"),
        ("top_p", 1.5, "top_p"),
        ("top_k", -2, "top_k"),
        ("top_k", 1.5, "top_k"),
        ("min_p", -1, "min_p"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("presence_penalty", 3, "presence_penalty"),
        ("frequency_penalty", -3, "frequency_penalty"),
        ("seed", 2**63, "seed"),
        ("seed", 1.5, "seed"),
        ("logprobs", 21, "logprobs"),
        ("logprobs", -1, "logprobs"),
        ("logprobs", True, "logprobs"),
        ("prompt_logprobs", 10**9, "prompt_logprobs"),
        ("stop", 3, "stop"),
        ("stop", [""], "stop[0]"),
        ("stop", ["a"] * 17, "stop"),
        ("stop", ["a" * 257], "stop[0]"),
        ("stop", [["a"]], "stop"),
        ("stop_token_ids", [-1], "stop_token_ids[0]"),
        ("stop_token_ids", "1", "stop_token_ids"),
        ("stop_token_ids", [1] * 10**4, "stop_token_ids"),
        ("logit_bias", {"a": 1}, "logit_bias"),
        ("logit_bias", {"-1": 1}, "logit_bias"),
        ("logit_bias", {"1": 101}, "logit_bias.1"),
        ("logit_bias", {"1": "x"}, "logit_bias.1"),
        ("logit_bias", [1], "logit_bias"),
        ("logit_bias", {str(i): 1 for i in range(10**5)}, "logit_bias"),
        ("stream", "yes", "stream"),
        ("stream", 1, "stream"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("echo", "no", "echo"),
        ("user", 7, "user"),
        ("suffix", "the end", "suffix"),
        ("guided_json", {"type": "object"}, "guided_json"),
        ("truncate_prompt_tokens", 5, "truncate_prompt_tokens"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(
    rim: Rim, http: httpx.Client, field: str, value: object, param: str
) -> None:
    error = error_of(http.post("/v1/completions", json={"model": "tale", "prompt": "Hi", field: value}), 400)
    assert error["param"] == param
    assert param in error["message"]
    assert len(error["message"]) < 300
    assert rim.backend.calls == []
    assert rim.backend.refusals == [400]


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_a_missing_field_is_named(http: httpx.Client, field: str) -> None:
    body = {"model": "tale", "prompt": "Hi"}
    del body[field]
    assert error_of(http.post("/v1/completions", json=body), 400)["message"] == f"{field} is missing"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b'{"model": "tale", "prompt": "Hi", "temperature": NaN}',
        b'{"model": "tale", "prompt": "\\ud800"}',
        b'{"model": "tale", "prompt": "\xff"}',
        b'{"model": "tale", "prompt": "\xed\xa0\x80"}',
        b'{"model": "tale", "prompt": ' + b"[" * 100_000,
        b'{"model": "tale", "prompt": "Hi", "seed": ' + b"9" * 100_000 + b"}",
        b"{'model': 'tale'}",
    ],
)
def test_broken_json_is_a_400(http: httpx.Client, body: bytes) -> None:
    for route in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        error_of(http.post(route, content=body), 400)


def test_an_infinite_number_is_out_of_range(http: httpx.Client) -> None:
    body = b'{"model": "tale", "prompt": "Hi", "temperature": 1e999}'
    assert error_of(http.post("/v1/completions", content=body), 400)["param"] == "temperature"


@pytest.mark.parametrize("value", ["{{ x }}", "", {"a": 1}, {}])
@pytest.mark.parametrize("field", ["chat_template", "chat_template_kwargs"])
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_template_from_the_request_is_refused_everywhere(
    http: httpx.Client, route: str, field: str, value: object
) -> None:
    body = {"model": "tale", "prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}], "tokens": [1]}
    assert error_of(http.post(route, json={**body, field: value}), 400)["param"] == field


def test_an_unknown_model_is_a_404_that_names_the_known_ones(openai: OpenAI) -> None:
    with pytest.raises(client_errors.NotFoundError) as caught:
        openai.completions.create(model="gpt-5", prompt="Hi")
    assert "tale@bf16" in caught.value.message
    assert caught.value.code == "model_not_found"


def test_an_unknown_route_is_a_404_and_a_wrong_method_a_405(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "unknown_url"
    assert error_of(http.get("/docs"), 404)["code"] == "unknown_url"
    response = http.get("/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert error_of(http.get("/health/"), 404)


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (ContextLengthExceeded("prompt + max_tokens exceed 64 tokens", param="max_tokens"), 400, None),
        (Overloaded("the queue of bf16 is full", retry_after_s=2.4), 429, "3"),
        (VariantUnavailable("bf16 is still loading"), 503, "1"),
        (GenerationFailed("the engine failed"), 500, None),
        (CheckpointError("/srv/models/secret/model.safetensors is truncated"), 500, None),
    ],
)
@pytest.mark.parametrize("raised", [True, False], ids=["raised", "as an event"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_the_first_token_keeps_its_status_and_says_who_was_asked(
    rim: Rim,
    http: httpx.Client,
    error: HalftoneError,
    status: int,
    retry_after: str | None,
    raised: bool,
    stream: bool,
) -> None:
    rim.backend.script = lambda request: [error if raised else failure(request, error)]
    response = http.post("/v1/completions", json={"model": "tale", "prompt": "Hi", "stream": stream})
    body = error_of(response, status)
    assert response.headers.get("retry-after") == retry_after
    assert response.headers["x-halftone-variant"] == "bf16"
    assert "/srv" not in body["message"]


def test_an_error_in_the_middle_is_an_event_that_ends_the_stream(rim: Rim, openai: OpenAI, http: httpx.Client) -> None:
    def breaks(request: GenerationRequest) -> list[Event | HalftoneError]:
        return [*story(request)[:4], GenerationFailed("the replica of bf16 died")]

    rim.backend.script = breaks
    body = {"model": "tale", "prompt": "Hi", "stream": True}
    *chunks, last = sse(http.post("/v1/completions", json=body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Once upon a"
    assert last["error"]["message"] == "the replica of bf16 died"
    with pytest.raises(client_errors.APIError, match="bf16 died"):
        list(openai.completions.create(model="tale", prompt="Hi", stream=True))


def test_one_failed_prompt_fails_the_whole_answer(rim: Rim, http: httpx.Client) -> None:
    def second_fails(request: GenerationRequest) -> list[Event | HalftoneError]:
        return story(request) if request.request_id.endswith("-0") else [failure(request, InvalidRequest("bad"))]

    rim.backend.script = second_fails
    error_of(http.post("/v1/completions", json={"model": "tale", "prompt": ["a", "b"]}), 400)
    assert len(rim.backend.cancelled) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_without_an_end_is_an_error_never_a_short_answer(rim: Rim, http: httpx.Client, stream: bool) -> None:
    rim.backend.script = lambda request: story(request)[:3]
    response = http.post("/v1/completions", json={"model": "tale", "prompt": "Hi", "stream": stream})
    error = sse(response)[-1]["error"] if stream else error_of(response, 500)
    assert error["code"] == "generation_failed"


@pytest.mark.parametrize("stream", [True, False])
def test_a_bug_behind_the_rim_shows_neither_trace_nor_message(rim: Rim, http: httpx.Client, stream: bool) -> None:
    def bug(request: GenerationRequest) -> list[Event | HalftoneError]:
        raise ZeroDivisionError("/srv/secret")

    rim.backend.script = bug
    response = http.post("/v1/completions", json={"model": "tale", "prompt": "Hi", "stream": stream})
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text


def test_a_bug_in_the_middle_of_a_stream_is_told_in_the_stream(rim: Rim, http: httpx.Client) -> None:
    rim.backend.script = lambda request: [
        PromptDelta(request.request_id, (1,)),
        Delta(request.request_id, 0, "Once", (4,)),
        Delta(request.request_id, 99, "no such choice", (4,)),
    ]
    said: list[str] = []
    body = {"model": "tale", "prompt": "Hi", "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response, pytest.raises(httpx.RemoteProtocolError):
        said.extend(response.iter_text())
    last = json.loads("".join(said).strip().rpartition("data: ")[2])
    assert last["error"]["code"] == "generation_failed"


def test_not_ready_names_what_is_missing_without_paths(rim: Rim, http: httpx.Client) -> None:
    assert http.get("/ready").json() == {"status": "ready", "variants": {"bf16": "ready", "nf4": "failed"}}
    rim.backend.is_ready = False
    response = http.get("/ready")
    assert error_of(response, 503)["message"] == "not ready: bf16 ready, nf4 failed (no file x.bin)"
    assert response.headers["retry-after"] == "1"
