"""What orchestrators and people look at: `/`, `/health`, `/ready` and `/metrics`."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, FastAPI
from starlette.responses import PlainTextResponse

from serve.api.backend import Backend, ModelCard
from serve.api.openapi import ERRORS
from serve.errors import VariantUnavailable

__all__ = ["index_routes", "operation_routes"]

_PROMETHEUS_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"


def operation_routes(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["operations"], responses=ERRORS)

    @router.get("/health")
    async def health() -> dict[str, str]:
        """This process answers. Says nothing of the models: that is `/ready`."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, Any]:
        """Every variant has loaded or failed, and the model can be asked; 503 until then."""
        cards = [card for card in backend.models() if card.variant]
        if not backend.ready():
            raise VariantUnavailable(f"not ready: {_states(cards) or 'no variant is known yet'}", retry_after_s=1)
        return {"status": "ready", "variants": {card.variant: card.state for card in cards}}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Prometheus text."""
        return PlainTextResponse(await backend.metrics(), media_type=_PROMETHEUS_TEXT)

    return router


def index_routes(app: FastAPI) -> APIRouter:
    router = APIRouter(tags=["operations"], responses=ERRORS)

    @router.get("/")
    async def index() -> dict[str, Any]:
        """Which routes there are."""
        return {"name": app.title, "version": app.version, "routes": sorted(app.openapi()["paths"])}

    return router


def _states(cards: list[ModelCard]) -> str:
    return ", ".join(f"{card.variant} {card.state}{f' ({card.reason})' if card.reason else ''}" for card in cards)
