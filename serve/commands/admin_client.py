"""A small client of a running server's `/admin`: JSON in, JSON out, every failure one clear line."""

from __future__ import annotations

from types import TracebackType
from typing import Annotated, Any

import typer

from serve.errors import SetupError

__all__ = ["AdminClient", "AdminKey", "Url"]

Url = Annotated[str, typer.Option("--url", envvar="HALFTONE_URL", help="The running server.")]
AdminKey = Annotated[
    str | None,
    typer.Option("--admin-key", envvar="HALFTONE_ADMIN_KEY", help="Where the server has one; better in the variable."),
]
DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT_S = 60.0


class AdminClient:
    """`with AdminClient(url, key) as admin: admin.get("/rollouts")`. Raises SetupError for whatever goes wrong."""

    def __init__(self, url: str, key: str | None = None) -> None:
        import httpx

        self._url = url.rstrip("/")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=f"{self._url}/admin", headers=headers, timeout=_TIMEOUT_S)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def get(self, path: str) -> Any:
        return self._ask("GET", path)

    def post(self, path: str, body: object) -> Any:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        import httpx

        try:
            answer = self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise SetupError(f"the server at {self._url} did not answer within {_TIMEOUT_S:g} s") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise SetupError(
                f"no server answers at {self._url} ({error}): start one with `halftone serve`, or say where with --url"
            ) from error
        if answer.is_success:
            return answer.json()
        raise SetupError(_told(answer.status_code, answer))


def _told(status: int, answer: Any) -> str:
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the server answered with status {status}; is it Halftone's?"
    return f"{message} (--admin-key or HALFTONE_ADMIN_KEY)" if status == 401 else message
