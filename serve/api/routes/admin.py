"""`/admin`: what runs, and who gets it. `auth.py` decides who may ask."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from serve.api.backend import Backend
from serve.api.openapi import ERRORS, takes
from serve.api.reading import read_json
from serve.api.schema import TrafficBody, parse
from serve.api.settings import ApiSettings

__all__ = ["admin_routes"]


def admin_routes(backend: Backend, settings: ApiSettings) -> APIRouter:
    router = APIRouter(prefix="/admin", tags=["admin"], responses=ERRORS)

    @router.get("/variants")
    async def variants() -> dict[str, Any]:
        """Every variant with its state, its load report and its memory in bytes."""
        return {"variants": await backend.variants()}

    @router.get("/traffic")
    async def traffic() -> Any:
        """The split in force."""
        return await backend.traffic()

    @router.put("/traffic", openapi_extra=takes(TrafficBody))
    async def set_traffic(request: Request) -> Any:
        """Deal traffic anew. Restarts nothing; answers under way stay where they are."""
        body = parse(TrafficBody, await read_json(request, settings.limits))
        return await backend.set_traffic(body.weights, body.shadow)

    return router
