"""Every failure becomes OpenAI's shape, in one place. Nothing of a trace, and no absolute path, leaves here.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.errors import ConfigError, HalftoneError, RequestError, ServiceError, Unauthorized

__all__ = ["error_body", "error_event", "error_response", "install_error_handlers", "without_paths"]

_RETRY_AFTER_S: Final = 1.0
_RETRYABLE: Final = (429, 503)
_PATH: Final = re.compile(r"(?<![\w:/.@-])/(?:[^\s/'\":,]+/)+([^\s/'\":,]*)")

log = logging.getLogger(__name__)


def error_response(error: HalftoneError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The status, the body and, where waiting helps, `Retry-After` in whole seconds."""
    status, body = error_body(error)
    extra = dict(headers or {})
    if status in _RETRYABLE:
        seconds = getattr(error, "retry_after_s", None) or _RETRY_AFTER_S
        extra["retry-after"] = str(max(1, math.ceil(seconds)))
    if isinstance(error, Unauthorized):
        extra["www-authenticate"] = "Bearer"
    return JSONResponse(body, status, extra)


def error_body(error: HalftoneError) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the JSON of an error. A `SetupError` is ours to mend, so the client only learns that."""
    if isinstance(error, RequestError):
        return error.status, _body(error.message, error.type, error.param, error.code)
    if isinstance(error, ConfigError):
        return 400, _body(error.message, RequestError.type, error.path or None, "invalid_config")
    if isinstance(error, ServiceError):
        return error.status, _body(without_paths(error.message), error.type, None, error.code)
    log.error("%s: %s", type(error).__name__, error.message)
    return 500, _INTERNAL


def without_paths(message: str) -> str:
    """The message with every absolute path cut down to its last name."""
    return _PATH.sub(r"\1", message)


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(HalftoneError, _on_halftone_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)


async def _on_halftone_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HalftoneError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own: a route or a method that does not exist."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    message = f"{request.method} {path}: {HTTPStatus(error.status_code).phrase.lower()}; GET / lists the routes"
    kind = "not_found_error" if error.status_code == HTTPStatus.NOT_FOUND else RequestError.type
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return JSONResponse(_body(message[:300], kind, None, code), error.status_code, dict(error.headers or {}))


async def _on_bug(request: Request, error: Exception) -> Response:
    """The trace goes to the log (the server raises on), never to the client."""
    return JSONResponse(_INTERNAL, 500)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_INTERNAL: Final = _body(
    "the server failed on this request; its log says why", ServiceError.type, None, "internal_error"
)


def error_event(error: HalftoneError) -> bytes:
    """The same as a server-sent event, for an answer that has already begun."""
    return b"data: " + json.dumps(error_body(error)[1], separators=(",", ":")).encode() + b"\n\n"
