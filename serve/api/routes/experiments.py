"""`/admin/experiments`: start one, read it, stop it. docs/EXPERIMENTS.md has the shapes; `auth.py` decides who may."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path
from starlette.requests import Request

from serve.api.backend import Experiments
from serve.api.openapi import ERRORS, takes
from serve.api.reading import read_json
from serve.api.schema import ExperimentBody, parse
from serve.api.settings import ApiSettings

__all__ = ["experiment_routes"]

Name = Annotated[str, Path(max_length=64)]


def experiment_routes(experiments: Experiments, settings: ApiSettings) -> APIRouter:
    router = APIRouter(prefix="/admin/experiments", tags=["admin"], responses=ERRORS)

    @router.get("")
    async def list_experiments() -> Any:
        """Every experiment that there was, the newest first."""
        return await experiments.all()

    @router.post("", openapi_extra=takes(ExperimentBody))
    async def start(request: Request) -> Any:
        """Begin one, now or later; only one is scheduled or running at a time."""
        raw = await read_json(request, settings.limits)
        parse(ExperimentBody, raw)
        return await experiments.start(raw)

    @router.get("/{name}/report")
    async def report(name: Name) -> Any:
        """What each variant gave, with intervals that hold while one watches."""
        return await experiments.report(name)

    @router.post("/{name}/stop")
    async def stop(name: Name) -> Any:
        """End it; traffic is again what it was before."""
        return await experiments.stop(name)

    return router
