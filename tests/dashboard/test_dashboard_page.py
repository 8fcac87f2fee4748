"""What the page shows, in a real browser."""

from __future__ import annotations

import pytest

from tests.dashboard.conftest import Server, playwright

pytestmark = pytest.mark.browser
expect = playwright.expect


def test_the_page_loads_without_a_word_on_the_console(server: Server, page: playwright.Page) -> None:
    server.stage.answered("bf16", 3)
    page.goto(f"{server.url}/dashboard")
    expect(page.get_by_role("status").first).to_contain_text("3 of 4 variants ready")
    for title in ("Traffic", "Variants", "Which precision", "Loupe", "Over time", "Latency", "Memory"):
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
