"""The OpenAPI document: routes read their bodies themselves, so their schemas are put in here."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serve.api.schema import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ExperimentBody,
    OrderBody,
    RolloutBody,
    TokenizeChatBody,
    TokenizeTextBody,
    TrafficBody,
)

__all__ = ["ERRORS", "describe", "takes"]

_BODIES: Final[tuple[type[Body], ...]] = (
    CompletionBody,
    ChatBody,
    TokenizeTextBody,
    TokenizeChatBody,
    DetokenizeBody,
    TrafficBody,
    RolloutBody,
    OrderBody,
    ExperimentBody,
)
_REF: Final = "#/components/schemas/{model}"
_TEXT_OR_NULL: Final = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}

ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}}
    for status, text in (("4XX", "The request is at fault; `param` names the field."), ("5XX", "The server is."))
}
"""`responses=` of every route."""


def takes(*bodies: type[Body]) -> dict[str, Any]:
    """`openapi_extra=` of a route that reads one of these bodies."""
    refs = [{"$ref": _REF.format(model=body.__name__)} for body in bodies]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> None:
    """Let the app describe itself with the bodies' schemas and the one shape of errors."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, schemas = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REF)
    components = document.setdefault("components", {})
    components["schemas"] = {**components.get("schemas", {}), **schemas["$defs"], "Error": _ERROR}
    return document
