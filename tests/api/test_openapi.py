"""The OpenAPI document is valid, complete, and says what the parser does."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from serve.api.app import create_app
from serve.api.schema import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeTextBody, TrafficBody, parse
from serve.errors import InvalidRequest
from tests.api.scripted import ScriptedBackend

DOCUMENT: dict[str, Any] = create_app(ScriptedBackend()).openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]
VALID: dict[type[Body], dict[str, Any]] = {
    CompletionBody: {"model": "tale", "prompt": "Hi"},
    ChatBody: {"model": "tale", "messages": [{"role": "user", "content": "Hi"}]},
    TokenizeTextBody: {"prompt": "Hi"},
    DetokenizeBody: {"tokens": [1]},
    TrafficBody: {"weights": {"bf16": 100}},
}

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@cache
def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]})


def references(node: Any) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(references, node))
    if isinstance(node, dict):
        return {node["$ref"]} if isinstance(node.get("$ref"), str) else set().union(*map(references, node.values()))
    return set()


def test_the_document_is_served_and_every_reference_leads_somewhere(http: httpx.Client) -> None:
    served = http.get("/openapi.json").json()
    assert served == json.loads(json.dumps(DOCUMENT))
    assert served["openapi"].startswith("3.1")
    assert references(served) <= {f"#/components/schemas/{name}" for name in SCHEMAS}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_a_json_schema(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])


def test_every_operation_says_what_it_takes_and_how_it_fails() -> None:
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], path
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}, path
            assert ("requestBody" in operation) == (method in ("post", "put")), path


def test_the_error_schema_is_what_errors_look_like(http: httpx.Client) -> None:
    for response in (http.get("/none"), http.post("/v1/completions", json={})):
        validator("Error").validate(response.json())


@pytest.mark.parametrize("body", [CompletionBody, ChatBody])
def test_the_fields_that_clients_rely_on_are_in_the_schema(body: type[Body]) -> None:
    known = set(SCHEMAS[body.__name__]["properties"])
    assert {"model", "max_tokens", "stream", "stream_options", "temperature", "top_k", "min_p", "seed"} <= known
    assert {"ignore_eos", "min_tokens", "repetition_penalty", "stop_token_ids", "logprobs", "n", "user"} <= known


@pytest.mark.parametrize("body", VALID)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_the_parser_takes_the_schema_allows_and_all_else_is_a_clear_400(body: type[Body], data: Any) -> None:
    fields = [*SCHEMAS[body.__name__]["properties"], "chat_template", "unheard_of"]
    changes = data.draw(st.dictionaries(st.sampled_from(fields), ANY_JSON, max_size=3))
    raw = {**VALID[body], **changes}
    refusal = refused(body, raw)
    if refusal is None:
        assert validator(body.__name__).is_valid(raw)
    else:
        assert refusal.param is None or refusal.param.split(".")[0].split("[")[0] in raw
        assert "\n" not in refusal.message


def refused(body: type[Body], raw: dict[str, Any]) -> InvalidRequest | None:
    try:
        parse(body, raw)
    except InvalidRequest as error:
        return error
    return None
