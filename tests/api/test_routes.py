"""Models, tokens, operations and admin: the routes beside generation."""

from __future__ import annotations

import httpx
import pytest
from openai import NotFoundError, OpenAI

from tests.api.conftest import Rim


def test_models_list_the_name_and_every_variant(openai: OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in openai.models.list()] == ["tale", "tale@bf16", "tale@nf4"]
    assert openai.models.retrieve("tale@bf16").owned_by == "halftone"
    with pytest.raises(NotFoundError, match="served are: tale, "):
        openai.models.retrieve("org/other")
    broken = http.get("/v1/models/tale@nf4").json()
    assert (broken["state"], broken["reason"], broken["parent"]) == ("failed", "no file x.bin", "tale")


def test_text_and_conversations_are_tokenized_as_in_vllm(http: httpx.Client) -> None:
    text = http.post("/tokenize", json={"model": "tale", "prompt": "the fox", "return_token_strs": True}).json()
    assert text == {"count": 3, "max_model_len": 64, "tokens": [3, 3, 4], "token_strs": ["<s>", "the", " fox"]}
    bare = http.post("/tokenize", json={"prompt": "the fox", "add_special_tokens": False}).json()
    assert (bare["tokens"], bare["token_strs"]) == ([3, 4], None)
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "the fox"}]}).json()
    assert chat["tokens"] == [3, 4]


def test_token_ids_become_text_again(http: httpx.Client) -> None:
    assert http.post("/detokenize", json={"model": "tale", "tokens": [2, 1]}).json() == {"prompt": "xxx"}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("route", "body", "status", "param"),
    [
        ("/tokenize", {"model": "other", "prompt": "a"}, 404, "model"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/detokenize", {"tokens": [1, -1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": "1"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1001]}, 400, "tokens"),
    ],
)
def test_what_cannot_be_tokenized_is_named(
    http: httpx.Client, route: str, body: dict[str, object], status: int, param: str
) -> None:
    response = http.post(route, json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_operations_answer_in_their_formats(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert metrics.text.endswith("halftone_requests 1\n")
    assert "/v1/completions" in http.get("/").json()["routes"]


def test_traffic_is_read_and_dealt_anew(http: httpx.Client) -> None:
    assert http.get("/admin/variants").json()["variants"][0]["name"] == "bf16"
    assert http.get("/admin/traffic").json()["weights"] == {"bf16": 100.0, "nf4": 0.0}
    changed = http.put("/admin/traffic", json={"weights": {"bf16": 70, "nf4": 30}})
    assert changed.json()["weights"] == http.get("/admin/traffic").json()["weights"] == {"bf16": 70.0, "nf4": 30.0}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "weights"),
        ({"weights": {}}, "weights"),
        ({"weights": {"bf16": 101}}, "weights.bf16"),
        ({"weights": {"bf16": "70"}}, "weights.bf16"),
        ({"weights": {"bf16": 70}}, "traffic.weights"),
        ({"weights": {"bf16": 100}, "shadow": {"nf4": 2}}, "shadow.nf4"),
    ],
)
def test_traffic_that_does_not_add_up_changes_nothing(
    rim: Rim, http: httpx.Client, body: dict[str, object], param: str
) -> None:
    before = rim.backend.split
    response = http.put("/admin/traffic", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert rim.backend.split == before
