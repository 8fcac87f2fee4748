"""From a checked call to the bytes of its answer: start it, wait for its first event, then write it, whole or streamed.

The status and the headers go out after the first event, so that a call that is refused behind the rim still gets its
proper status, and every answer says in its headers who gave it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.answers import Plan, Transcript, body, chunks
from serve.api.backend import Answer, Backend
from serve.api.errors import error_event, error_response
from serve.api.feed import ClientGone, Feed, while_connected
from serve.api.sse import EventStream
from serve.errors import GenerationFailed, HalftoneError
from serve.generation import Delta, Disclosure, PromptDelta

__all__ = ["AnswerResponse"]

Events = list[PromptDelta | Delta]


class AnswerResponse(Response):
    """Generates while it is sent. If the client goes away, at whatever point, the call is cancelled at once."""

    def __init__(self, backend: Backend, plan: Plan, write_timeout_s: float) -> None:
        super().__init__()
        self._backend = backend
        self._plan = plan
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            async with while_connected(receive):
                answer = await self._backend.start(self._plan.call)
                async with Feed(answer) as feed:
                    response = await self._first(answer, feed)
                    await response(scope, receive, send)

    async def _first(self, answer: Answer, feed: Feed) -> Response:
        """The response that the first event decides on."""
        headers = _headers(self._plan, answer.disclosure)
        try:
            events = await feed.batch()
            if self._plan.call.stream:
                return EventStream(self._pieces(answer.disclosure, feed, events), headers, self._write_timeout_s)
            return _json(await self._whole(answer.disclosure, feed, events), headers)
        except HalftoneError as error:
            return error_response(error, headers)

    async def _whole(self, disclosure: Disclosure, feed: Feed, events: Events) -> dict[str, Any]:
        transcript = Transcript(self._plan)
        while events:
            for event in events:
                transcript.add(event)
            events = await feed.batch()
        return body(self._plan, disclosure, transcript)

    async def _pieces(self, disclosure: Disclosure, feed: Feed, events: Events) -> AsyncGenerator[bytes, None]:
        """One piece per batch of events. An error after the first is told in the stream, and ends it."""
        writer = chunks(self._plan, disclosure)
        try:
            while events:
                if text := writer.write(events):
                    yield text.encode()
                events = await feed.batch()
            yield writer.end().encode()
        except HalftoneError as error:
            yield error_event(error)
        except Exception:
            yield error_event(GenerationFailed("the server failed while it wrote this answer"))
            raise


def _headers(plan: Plan, disclosure: Disclosure) -> dict[str, str]:
    return {
        "x-halftone-variant": disclosure.variant,
        "x-halftone-precision": disclosure.precision,
        "x-halftone-route": disclosure.route,
        "x-request-id": plan.call_id,
    }


def _json(content: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    encoded = json.dumps(content, separators=(",", ":")).encode()
    return Response(encoded, headers=dict(headers), media_type="application/json")
