"""Reading a request's body within its limits. Knows JSON and ASGI, no field of any route.

A body is refused by its size while it streams in, and by its number of elements before it is parsed, so that the most
expensive body costs the loop a bounded number of milliseconds and flat memory.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from serve.api.limits import Limits
from serve.errors import InvalidRequest, RequestTimeout, RequestTooLarge

__all__ = ["read_json"]

_HEAD_BYTES: Final = 64 * 1024
_MARKS: Final = (b",", b"[", b"{")
"""One for every element of a list or an object, and one for every list or object."""


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The body as a JSON object. Raises `InvalidRequest`, `RequestTooLarge` or `RequestTimeout`, never for a field."""
    body = await _read(request, limits)
    if sum(map(body.count, _MARKS)) > limits.body_elements:
        raise _too_many_elements(body, limits)
    try:
        parsed = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(parsed, dict):
        raise InvalidRequest("the body must be a JSON object", code="invalid_json")
    return parsed


async def _read(request: Request, limits: Limits) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {limits.body_timeout_s:g} s") from None
    except ClientDisconnect:
        raise InvalidRequest("the body ended early") from None
    return bytes(body)


def _too_large(limits: Limits) -> RequestTooLarge:
    return RequestTooLarge(f"the body is larger than {limits.body_bytes} bytes", code="request_too_large")


def _too_many_elements(body: bytes, limits: Limits) -> InvalidRequest:
    """Names the field that the first bytes end in: the huge list is what cuts them off."""
    try:
        head = from_json(body[:_HEAD_BYTES], allow_partial=True)
    except ValueError:
        head = None
    param = next(reversed(head), None) if isinstance(head, dict) else None
    name = "the body" if param is None else str(param)[:64]
    message = f"{name}: holds too many elements; a request may hold {limits.body_elements}"
    return InvalidRequest(message, param=None if param is None else name)
