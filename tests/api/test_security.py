"""The cases of old that felled servers, as far as they meet the rim."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from serve.api import ApiSettings, Keys, Limits
from serve.api.app import create_app
from serve.api.auth import PUBLIC_PATHS, authorize
from serve.dashboard import PAGE_PATHS
from serve.errors import Forbidden, Unauthorized
from tests.api.conftest import Rim, run_rim
from tests.api.scripted import ANSWER, ScriptedBackend

LOCKED = ApiSettings(
    keys=Keys.of(["sk-one", "sk-two"], admin="sk-admin"), limits=Limits(body_timeout_s=0.3, body_bytes=8 * 2**20)
)
BODY = {"model": "tale", "prompt": "Hi"}


@pytest.fixture(scope="module")
def locked() -> Iterator[Rim]:
    yield from run_rim(LOCKED)


@pytest.fixture(scope="module")
def door(locked: Rim) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=locked.url, timeout=30) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def raw(port: int, request: bytes) -> tuple[int, str]:
    """Status and body of what a byte sequence is answered with."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(20)
        client.sendall(request)
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body.decode()


# -- keys ------------------------------------------------------------------------------------------------------------


def routes() -> list[tuple[str, str]]:
    listed = create_app(ScriptedBackend()).openapi()["paths"]
    return [(method.upper(), path) for path, operations in listed.items() for method in operations]


def served(routes: Iterable[Any]) -> set[str]:
    """Every path that the framework would match, however its routers nest."""
    found: set[str] = set()
    for route in routes:
        inner = getattr(route, "original_router", route)
        found |= served(inner.routes) if getattr(inner, "routes", None) else {route.path}
    return found


def test_the_walk_below_meets_every_route() -> None:
    found = served(create_app(ScriptedBackend()).routes)
    assert {path.replace(":path", "") for path in found} == {path for _, path in routes()} | {"/openapi.json"}


@pytest.mark.parametrize(("method", "path"), [*routes(), ("GET", "/openapi.json"), ("GET", "/nothing"), ("PUT", "/v1")])
def test_every_route_but_the_probes_and_the_page_needs_a_key(door: httpx.Client, method: str, path: str) -> None:
    keyless = door.request(method, path)
    wrong = door.request(method, path, headers=bearer("sk-three"))
    if path in PUBLIC_PATHS | PAGE_PATHS:
        assert keyless.status_code == 200
        return
    for response in (keyless, wrong):
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert "sk-" not in response.text
    assert door.request(method, path, headers=bearer("sk-admin")).status_code != 401


def test_each_key_opens_the_api_and_only_the_admin_key_opens_admin(door: httpx.Client) -> None:
    for key in ("sk-one", "sk-two", "sk-admin"):
        assert door.post("/v1/completions", json=BODY, headers=bearer(key)).status_code == 200
    assert door.get("/admin/traffic", headers=bearer("sk-one")).status_code == 401
    assert door.get("/admin/traffic", headers=bearer("sk-admin")).status_code == 200


@pytest.mark.parametrize(
    "target",
    [
        b"//v1/models", b"/%761/models", b"/v1/../v1/models", b"/v1/models?/health", b"/v1/models#/health",
        b"/health/../v1/models", b"/health%2f..%2fv1/models", b"/v1/models;/health", b"http://x/v1/models",
        b"http://x/health/../v1/models", b"/health/", b"/HEALTH", b"/v1%2fmodels",
    ],
)  # fmt: skip
@pytest.mark.parametrize("host", [b"localhost", b"x/?", b"x/health?", b"a@b:99999999", b"[::"])
def test_no_spelling_of_a_path_or_host_opens_the_door(locked: Rim, target: bytes, host: bytes) -> None:
    request = b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
    status, body = raw(locked.port, request)
    assert status in (400, 401)
    assert '"object"' not in body


def test_keys_are_kept_as_digests_and_never_shown() -> None:
    assert "sk-" not in repr(LOCKED)
    assert all(len(digest) == 32 for digest in LOCKED.keys.api)


def scope(path: str, client: str | None = "127.0.0.1", **headers: str) -> dict[str, Any]:
    listed = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"path": path, "client": (client, 5) if client else None, "headers": listed}


@pytest.mark.parametrize(
    ("client", "host"), [("127.0.0.1", "127.0.0.1:8000"), ("::1", "[::1]:8000"), ("127.0.0.9", "localhost")]
)
def test_without_an_admin_key_this_machine_may_administer(client: str, host: str) -> None:
    authorize(scope("/admin/traffic", client, host=host), Keys())


@pytest.mark.parametrize(
    "asked",
    [
        scope("/admin/traffic", "10.0.0.7", host="127.0.0.1"),
        scope("/admin", "10.0.0.7", host="127.0.0.1"),
        scope("/admin/traffic", None, host="127.0.0.1"),
        scope("/admin/traffic", host="evil.example"),
        scope("/admin/traffic", host="127.0.0.1", origin="https://evil.example"),
        scope("/admin/traffic", host="127.0.0.1", origin="null"),
        scope("/admin/traffic", host="127.0.0.1", x_forwarded_for="10.0.0.7"),
        scope("/admin/traffic"),
    ],
)
def test_without_an_admin_key_nobody_else_may(asked: dict[str, Any]) -> None:
    with pytest.raises(Forbidden):
        authorize(asked, Keys())


def test_where_keys_are_set_local_administration_needs_one_too() -> None:
    with pytest.raises(Unauthorized):
        authorize(scope("/admin/traffic", host="localhost"), Keys.of(["sk-one"]))
    authorize(scope("/admin/traffic", host="localhost", authorization="Bearer sk-one"), Keys.of(["sk-one"]))


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def flat_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB; client and server together


@pytest.mark.usefixtures("flat_memory")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ["a"] * 10**6),
        ("prompt", [1] * 10**6),
        ("prompt", [[1]] * 10**6),
        ("stop", ["a"] * 10**6),
        ("stop_token_ids", [1] * 10**6),
        ("logit_bias", {str(i): 1 for i in range(4 * 10**5)}),
        ("n", 10**9),
        ("best_of", 10**9),
        ("logprobs", 10**9),
    ],
)
def test_asking_for_a_million_is_a_400_that_names_the_field(
    rim: Rim, http: httpx.Client, field: str, value: object
) -> None:
    content = json.dumps({**BODY, field: value}, separators=(",", ":")).encode()
    response = http.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert rim.backend.calls == []


def test_a_body_of_brackets_alone_is_refused_before_it_is_parsed(http: httpx.Client) -> None:
    nested = b"[" * 20 + b"]" * 20
    content = b'{"model": "tale", "prompt": "Hi", "x": [' + b",".join([nested] * 100_000) + b"]}"
    response = http.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert "too many elements" in response.json()["error"]["message"]


def test_prompts_times_choices_are_capped(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"model": "tale", "prompt": ["a"] * 64, "n": 64})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"


@pytest.mark.usefixtures("flat_memory")
def test_a_hundred_megabytes_are_refused_by_their_announcement(rim: Rim) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100000000\r\n\r\n"
    status, body = raw(rim.port, head)
    assert status == 413
    assert json.loads(body)["error"]["code"] == "request_too_large"


@pytest.mark.usefixtures("flat_memory")
def test_a_body_that_grows_too_large_is_refused_while_it_streams(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 2**20

    with suppress(httpx.WriteError):  # where the server answers and closes while we still write
        assert http.post("/v1/completions", content=endless()).status_code == 413


def test_a_body_that_never_ends_times_out(locked: Rim) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-one\r\nContent-Length: 100\r\n"
    status, body = raw(locked.port, head + b"Connection: close\r\n\r\n{")
    assert status == 408
    assert "0.3 s" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("headers", [{"x-big": "a" * 40_000}, {f"x-{i}": "a" for i in range(1000)}])
def test_too_many_or_too_large_headers_are_refused(http: httpx.Client, headers: dict[str, str]) -> None:
    try:
        response = http.get("/health", headers=headers)
    except httpx.RemoteProtocolError:
        return  # the server's own parser was faster
    assert response.status_code in (400, 431)


@pytest.mark.parametrize(
    "request_", [b"GET / HTTP/1.1\r\n\r\n", b"BREW /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]
)
def test_odd_requests_leave_the_server_alive(rim: Rim, http: httpx.Client, request_: bytes) -> None:
    with socket.create_connection(("127.0.0.1", rim.port)) as client:
        client.sendall(request_)
        client.recv(100)
    assert http.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "".join(ANSWER)


def test_callers_with_different_keys_never_share_a_computed_beginning(locked: Rim, door: httpx.Client) -> None:
    def salt(key: str, **body: Any) -> str:
        assert door.post("/v1/completions", json=BODY | body, headers=bearer(key)).status_code == 200
        return locked.backend.calls[-1].requests[0].cache_salt

    assert salt("sk-one") == salt("sk-one") != salt("sk-two")
    assert salt("sk-one", cache_salt="a") != salt("sk-one", cache_salt="b")
    assert "sk-one" not in salt("sk-one")
