"""`/admin/rollouts`: start one, watch it, steer it. docs/ROLLOUTS.md has the shapes; `auth.py` decides who may ask."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.api.backend import Rollouts
from serve.api.openapi import ERRORS, takes
from serve.api.reading import read_json
from serve.api.schema import OrderBody, RolloutBody, parse
from serve.api.settings import ApiSettings

__all__ = ["rollout_routes"]

Id = Annotated[str, Path(max_length=64)]
Order = Literal["pause", "resume", "approve", "promote", "abort"]


def rollout_routes(rollouts: Rollouts, settings: ApiSettings) -> APIRouter:
    router = APIRouter(prefix="/admin/rollouts", tags=["admin"], responses=ERRORS)

    @router.get("")
    async def list_rollouts() -> Any:
        """Every rollout that there was, the newest first."""
        return await rollouts.all()

    @router.post("", openapi_extra=takes(RolloutBody))
    async def start(request: Request) -> Any:
        """Begin a rollout; one that runs is ended for it. With `dry_run` only say what it would need."""
        raw = await read_json(request, settings.limits)
        parse(RolloutBody, raw)
        return await rollouts.start(raw)

    @router.get("/{id}")
    async def show(id: Id) -> Any:
        """One rollout: its plan, where it stands, the verdict guard by guard."""
        return await rollouts.show(id)

    @router.get("/{id}/history")
    async def history(id: Id) -> Any:
        """What happened, line by line."""
        return await rollouts.history(id)

    @router.get("/{id}/recorded")
    async def recorded(id: Id) -> Response:
        """The outcomes that are kept, for `halftone rollout certify`; "traffic" for those that came without one."""
        return JSONResponse(await rollouts.recorded(id))

    @router.post("/{id}/{order}", openapi_extra=takes(OrderBody))
    async def order(id: Id, order: Order, request: Request) -> Any:
        """Pause, resume, approve (or promote) or abort."""
        body = parse(OrderBody, await read_json(request, settings.limits))
        return await rollouts.order(id, order, body.by)

    return router
