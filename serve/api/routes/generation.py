"""`/v1/completions` and `/v1/chat/completions`: from a body to a `Call`, and what its answer must look like."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve.api.answering import AnswerResponse
from serve.api.answers import Plan, new_call_id
from serve.api.auth import tenant
from serve.api.backend import Backend, Call
from serve.api.openapi import ERRORS, takes
from serve.api.reading import read_json
from serve.api.schema import ChatBody, CompletionBody, parse
from serve.api.settings import ApiSettings, StickySource
from serve.errors import RequestError

__all__ = ["generation_routes"]

_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The answer; with `stream: true` its chunks as server-sent events, closed by `[DONE]`. The "
        "headers `x-halftone-variant`, `x-halftone-precision` and `x-halftone-route` say who gave it.",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **ERRORS,
}


def generation_routes(backend: Backend, settings: ApiSettings) -> APIRouter:
    router = APIRouter(tags=["generation"], responses=_ANSWERS)

    async def answer(request: Request, kind: type[ChatBody] | type[CompletionBody]) -> AnswerResponse:
        try:
            body = parse(kind, await read_json(request, settings.limits))
            plan = _plan(body, request, settings)
        except RequestError as error:
            backend.refused(error.status)
            raise
        if plan.echo:
            plan = plan.with_echo_texts(await _echo_texts(plan.call, backend))
        return AnswerResponse(backend, plan, settings.limits.write_timeout_s)

    @router.post("/v1/completions", openapi_extra=takes(CompletionBody), response_class=Response)
    async def completions(request: Request) -> AnswerResponse:
        """Continue prompts, given as text or as token ids."""
        return await answer(request, CompletionBody)

    @router.post("/v1/chat/completions", openapi_extra=takes(ChatBody), response_class=Response)
    async def chat_completions(request: Request) -> AnswerResponse:
        """Answer a conversation."""
        return await answer(request, ChatBody)

    return router


def _plan(body: ChatBody | CompletionBody, request: Request, settings: ApiSettings) -> Plan:
    call_id = new_call_id(body.kind)
    # Callers with different keys never learn from the speed of an answer what others have asked.
    salt = f"{tenant(request.headers, settings.keys)}/{body.cache_salt or ''}"
    call = Call(
        model=body.model,
        requests=tuple(replace(each, cache_salt=salt) for each in body.requests(call_id)),
        pin=request.headers.get("x-halftone-variant") or None,
        sticky_key=_sticky_key(body, request, settings.sticky),
        stream=body.stream,
    )
    return Plan(
        call_id=call_id,
        kind=body.kind,
        call=call,
        echo=isinstance(body, CompletionBody) and body.echo,
        return_token_ids=body.return_token_ids,
        prompt_logprobs=body.prompt_logprobs is not None,
        include_usage=body.includes_usage,
        continuous_usage=body.continues_usage,
    )


def _sticky_key(body: ChatBody | CompletionBody, request: Request, sticky: StickySource) -> str | None:
    if sticky == "user":
        return body.user or None
    return (request.headers.get("x-halftone-sticky-key") or None) if sticky == "header" else None


async def _echo_texts(call: Call, backend: Backend) -> dict[str, str]:
    """Prompts as they were sent; token ids as text, unless the replica will spell them for their logprobs anyway."""
    texts: dict[str, str] = {}
    for request in call.requests:
        if isinstance(request.prompt, str):
            texts[request.request_id] = request.prompt
        elif isinstance(request.prompt, tuple) and request.params.prompt_logprobs is None:
            texts[request.request_id] = await backend.detokenize(call.model, request.prompt)
    return texts
