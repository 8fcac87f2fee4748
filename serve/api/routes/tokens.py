"""`/tokenize` and `/detokenize`, in vLLM's shapes. The tokenizer lives in the replicas."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from serve.api.backend import Backend
from serve.api.openapi import ERRORS, takes
from serve.api.reading import read_json
from serve.api.schema import DetokenizeBody, TokenizeChatBody, TokenizeTextBody, parse
from serve.api.settings import ApiSettings
from serve.errors import VariantUnavailable
from serve.generation import Prompt

__all__ = ["token_routes"]


def token_routes(backend: Backend, settings: ApiSettings) -> APIRouter:
    router = APIRouter(tags=["tokens"], responses=ERRORS)

    @router.post("/tokenize", openapi_extra=takes(TokenizeTextBody, TokenizeChatBody))
    async def tokenize(request: Request) -> dict[str, Any]:
        """The token ids of a text, or of a conversation once the model's template is applied."""
        raw = await read_json(request, settings.limits)
        body = parse(TokenizeChatBody, raw) if "messages" in raw else parse(TokenizeTextBody, raw)
        prompt, add_special_tokens = _prompt(body)
        tokenized = await backend.tokenize(_model(body.model, backend), prompt, add_special_tokens)
        return {
            "count": len(tokenized.ids),
            "max_model_len": tokenized.context_length,
            "tokens": tokenized.ids,
            "token_strs": tokenized.pieces if body.return_token_strs else None,
        }

    @router.post("/detokenize", openapi_extra=takes(DetokenizeBody))
    async def detokenize(request: Request) -> dict[str, str]:
        """The text of token ids."""
        body = parse(DetokenizeBody, await read_json(request, settings.limits))
        return {"prompt": await backend.detokenize(_model(body.model, backend), body.tokens)}

    return router


def _prompt(body: TokenizeChatBody | TokenizeTextBody) -> tuple[Prompt, bool]:
    if isinstance(body, TokenizeChatBody):
        return body.chat(), body.add_special_tokens
    return body.prompt, body.add_special_tokens is not False


def _model(asked: str | None, backend: Backend) -> str:
    """As vLLM has it, the name may be left out here."""
    if asked is not None:
        return asked
    if cards := backend.models():
        return cards[0].id
    raise VariantUnavailable("no model is served yet")
