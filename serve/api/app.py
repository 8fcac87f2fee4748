"""The application that the ingress serves: routes over a backend, behind one gate.

No documentation page is served: it would load scripts from elsewhere. `/openapi.json` is the whole description.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from fastapi import FastAPI

from serve.api.auth import PUBLIC_PATHS
from serve.api.backend import Backend, Experiments, Rollouts
from serve.api.errors import install_error_handlers
from serve.api.guard import Guard
from serve.api.openapi import describe
from serve.api.routes import (
    admin_routes,
    experiment_routes,
    generation_routes,
    index_routes,
    model_routes,
    operation_routes,
    rollout_routes,
    token_routes,
)
from serve.api.settings import ApiSettings
from serve.dashboard import PAGE_PATHS, dashboard_routes

__all__ = ["create_app"]

_DESCRIPTION: Final = (
    "One language model at several precisions. `model: NAME` is routed by weight; `NAME@VARIANT`, or the header "
    "`x-halftone-variant`, pins. Every answer says who gave it."
)


def create_app(
    backend: Backend,
    settings: ApiSettings | None = None,
    rollouts: Rollouts | None = None,
    experiments: Experiments | None = None,
) -> FastAPI:
    settings = settings or ApiSettings()
    # No redirects to paths with a slash: they would be built from the client's own Host header.
    app = FastAPI(
        title="halftone",
        version=_version(),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(generation_routes(backend, settings))
    app.include_router(model_routes(backend))
    app.include_router(token_routes(backend, settings))
    app.include_router(operation_routes(backend))
    app.include_router(admin_routes(backend, settings))
    if rollouts is not None:
        app.include_router(rollout_routes(rollouts, settings))
    if experiments is not None:
        app.include_router(experiment_routes(experiments, settings))
    app.include_router(dashboard_routes())
    app.include_router(index_routes(app))
    install_error_handlers(app)
    describe(app)
    app.add_middleware(Guard, settings=settings, public_paths=PUBLIC_PATHS | PAGE_PATHS)
    return app


def _version() -> str:
    try:
        return version("halftone")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
