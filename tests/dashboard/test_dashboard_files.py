"""How the page's files are served."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import serve.dashboard
from serve.api.app import create_app
from serve.dashboard import PAGE_PATHS
from tests.dashboard.stage import Stage

STATIC = Path(serve.dashboard.__file__).parent / "static"


@pytest.fixture
def http() -> TestClient:
    return TestClient(create_app(Stage()))


def test_the_index_names_the_dashboard(http: TestClient) -> None:
    assert "/dashboard" in http.get("/").json()["routes"]


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_every_file_allows_scripts_and_styles_from_this_server_alone(http: TestClient, path: str) -> None:
    response = http.get(path)
    assert response.status_code == 200
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_an_unchanged_file_is_not_sent_again(http: TestClient) -> None:
    first = http.get("/dashboard/main.js")
    again = http.get("/dashboard/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["none.js", "index.html", "../routes.py", "..%2froutes.py", "vendor", "vendor/", ""])
def test_nothing_but_the_files_is_served(http: TestClient, name: str) -> None:
    response = http.get(f"/dashboard/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unknown_url"


def test_no_file_of_ours_names_another_server() -> None:
    ours = [path for path in STATIC.rglob("*") if path.is_file() and path.parent.name != "vendor"]
    assert ours
    for path in ours:
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text())
        assert set(addresses) <= {"http://www.w3.org"}, path  # SVG's name space


def test_the_chart_library_comes_with_its_licence() -> None:
    assert "MIT" in (STATIC / "vendor" / "uPlot.LICENSE.txt").read_text()


def test_the_files_are_part_of_the_package() -> None:
    listed = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file()}
    assert listed == {path.removeprefix("/dashboard/") for path in PAGE_PATHS - {"/dashboard"}} | {"index.html"}
