"""`/v1/models`: the public name and every variant behind it."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter

from serve.api.backend import Backend, ModelCard
from serve.api.errors import without_paths
from serve.api.openapi import ERRORS
from serve.errors import UnknownModel

__all__ = ["model_routes"]


def model_routes(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["models"], responses=ERRORS)
    created = int(time.time())

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Every name that `model` may be: NAME is routed, NAME@VARIANT pins."""
        return {"object": "list", "data": [_model(card, created) for card in backend.models()]}

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        """One of them."""
        cards = {card.id: card for card in backend.models()}
        if model_id not in cards:
            raise UnknownModel(f"model {model_id[:256]!r} is not served; served are: {', '.join(cards)}")
        return _model(cards[model_id], created)

    return router


def _model(card: ModelCard, created: int) -> dict[str, Any]:
    """OpenAI's four fields, vLLM's `root`, `parent` and `max_model_len`, and ours."""
    name = card.id.removesuffix(f"@{card.variant}") if card.variant else card.id
    return {
        "id": card.id,
        "object": "model",
        "created": created,
        "owned_by": "halftone",
        "root": name,
        "parent": name if card.variant else None,
        "max_model_len": card.context_length,
        "variant": card.variant,
        "precision": card.precision,
        "fingerprint": card.fingerprint,
        "state": card.state,
        "reason": without_paths(card.reason) if card.reason else None,
    }
