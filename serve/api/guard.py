"""The one gate in front of every route: the size of the headers, then who may call what. Plain ASGI, no route known."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.auth import PUBLIC_PATHS, authorize
from serve.api.errors import error_response
from serve.api.limits import Limits
from serve.api.settings import ApiSettings
from serve.errors import HeadersTooLarge, RequestError

__all__ = ["Guard"]


class Guard:
    def __init__(self, app: ASGIApp, settings: ApiSettings, public_paths: Collection[str] = PUBLIC_PATHS) -> None:
        self._app = app
        self._settings = settings
        self._public_paths = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            _check_headers(scope["headers"], self._settings.limits)
            authorize(scope, self._settings.keys, self._public_paths)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _check_headers(headers: Iterable[tuple[bytes, bytes]], limits: Limits) -> None:
    listed = list(headers)
    if len(listed) > limits.header_count:
        raise HeadersTooLarge(f"a request may have at most {limits.header_count} headers")
    if sum(len(name) + len(value) for name, value in listed) > limits.header_bytes:
        raise HeadersTooLarge(f"the headers may hold at most {limits.header_bytes} bytes")
