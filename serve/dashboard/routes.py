"""`/dashboard` and the files that it asks for: read once when the server starts, answered from memory."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from serve.api.openapi import ERRORS

__all__ = ["PAGE_PATHS", "dashboard_routes"]

_STATIC: Final = Path(__file__).parent / "static"
_PAGE: Final = "index.html"
_MEDIA_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # Asked for again every time, so that page and server are of one version; answered by 304 while nothing changed.
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> _File:
        content = path.read_bytes()
        return cls(content, _MEDIA_TYPES[path.suffix], f'"{sha256(content).hexdigest()[:16]}"')

    def respond(self, request: Request) -> Response:
        headers = {**_HEADERS, "etag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def _names() -> list[str]:
    return sorted(path.relative_to(_STATIC).as_posix() for path in _STATIC.rglob("*") if path.suffix in _MEDIA_TYPES)


PAGE_PATHS: Final = frozenset({"/dashboard", *(f"/dashboard/{name}" for name in _names() if name != _PAGE)})
"""Every path that this package answers. They hold no data, so they need no key."""


def dashboard_routes() -> APIRouter:
    """Raises OSError if the package was installed without its files."""
    files = {name: _File.read(_STATIC / name) for name in _names()}
    page = files.pop(_PAGE)
    router = APIRouter(tags=["dashboard"], responses=ERRORS)

    @router.get("/dashboard", response_class=HTMLResponse)
    async def dashboard(request: Request) -> Response:
        """The ops page."""
        return page.respond(request)

    @router.get("/dashboard/{name:path}", response_class=Response)
    async def dashboard_file(name: str, request: Request) -> Response:
        """A script, a style sheet or a picture of the ops page."""
        if name not in files:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return files[name].respond(request)

    return router
