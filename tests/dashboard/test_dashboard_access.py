"""Who reads with less contrast, by keyboard or by ear: the whole page, with everything on it that it can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.conftest import Server, playwright
from tests.dashboard.staged_rollouts import detail
from tests.dashboard.test_dashboard_page import REPORT, column, compare, open_page

pytestmark = pytest.mark.browser
expect = playwright.expect
Page = playwright.Page
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()


def fill(server: Server) -> None:
    """Traffic on every variant, drift within and beyond its guard, a variant that failed, and a rollout that runs."""
    for name in ("bf16", "int8", "nf4"):
        server.stage.answered(name, 30)
    server.stage.drifted("int8", tokens=500, kl_nats=0.003, agreeing=480)
    server.stage.drifted("nf4", tokens=500, kl_nats=0.2, agreeing=350)
    rollout = detail("r1", {"to": "int8", "steps": [{"weight": 5}, {"weight": 50}]})
    worse = {"guard": "e2e", "result": "fail", "sentence": "E2E +40 %"}
    rollout["verdict"]["findings"].append(rollout["verdict"]["findings"][0] | worse)
    ended = detail("r0", {"to": "nf4", "steps": [{"weight": 5}]}) | {"ended": True, "phase": "rolled_back"}
    server.stage.rollouts.begun = [rollout, ended]


def show_an_experiment(server: Server, page: Page) -> None:
    ended = {"name": "winter", "state": "ended", "baseline": "bf16", "stopped_by": "time"}
    page.route(f"{server.url}/", lambda route: route.fulfill(json={"routes": ["/admin/experiments"]}))
    listed: dict[str, Any] = {"active": None, "experiments": [ended]}
    page.route("**/admin/experiments", lambda route: route.fulfill(json=listed))
    page.route("**/admin/experiments/*/report", lambda route: route.fulfill(json={**REPORT, "experiment": ended}))


def weak(page: Page) -> list[str]:
    found = page.evaluate(CONTRAST)
    assert len(found) > 150  # it looked at the page
    return [f"{each['what']}: {each['ratio']:.2f}" for each in found if each["ratio"] < each["least"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(server: Server, page: Page, complaints: list[str], scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    fill(server)
    show_an_experiment(server, page)
    open_page(page, server)
    expect(page.locator("#experiments")).to_contain_text("winter has ended")
    expect(page.locator("#rollouts .fail")).to_contain_text("E2E +40 %")
    compare(page)
    page.get_by_role("region", name="Answer of nf4").focus()
    page.keyboard.press("End")
    page.get_by_label("the variant's own probability").check()
    assert "\n".join(weak(page)) == ""
    page.get_by_label("the reference's probability").check()
    assert "\n".join(weak(page)) == ""
    page.get_by_role("button", name="Key …").click()
    assert "\n".join(weak(page)) == ""
    page.keyboard.press("Escape")
    page.route("**/metrics", lambda route: route.abort())
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    assert "\n".join(weak(page)) == ""
    complaints.clear()


def test_whatever_can_be_focused_tells_a_screen_reader_its_name(server: Server, page: Page) -> None:
    """By the names that the browser itself works out."""
    fill(server)
    show_an_experiment(server, page)
    open_page(page, server)
    expect(page.locator("#experiments")).to_contain_text("winter has ended")
    compare(page)
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    seen = [node for node in tree if not node["ignored"]]

    def has(node: dict[str, Any], name: str) -> bool:
        return any(each["name"] == name and each["value"].get("value") for each in node.get("properties", []))

    focusable = [node for node in seen if has(node, "focusable") and node["role"]["value"] != "RootWebArea"]
    pictures = [node for node in seen if node["role"]["value"] in ("image", "img", "figure", "table", "form")]
    assert len(focusable) > 30
    # <main> is where the skip link leads, and is not stopped at on the way.
    nameless = [node for node in [*focusable, *pictures] if not node.get("name", {}).get("value")]
    assert [node["role"]["value"] for node in nameless if node["role"]["value"] != "main"] == []


def tab_to(page: Page, target: playwright.Locator, most: int = 60) -> None:
    """By the Tab key alone, and what is stopped at on the way shows where the focus is."""
    for _ in range(most):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", page.evaluate("document.activeElement.outerHTML.slice(0, 200)")
        if target.evaluate("node => node === document.activeElement"):
            return
    raise AssertionError("the key never came there")


def test_a_rollout_is_begun_and_aborted_without_a_mouse(server: Server, page: Page) -> None:
    open_page(page, server)
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_enabled()
    tab_to(page, page.get_by_label("Steps, percent"))
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("10, 50")
    page.keyboard.press("Enter")
    expect(page.locator("#rollouts")).to_contain_text("1 of 2 (10 %, 50 %)")
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#main").focus()
    tab_to(page, page.get_by_role("button", name="Abort"))
    page.keyboard.press("Space")
    expect(page.locator("#rollouts")).to_contain_text("int8 was aborted by dashboard")


def test_the_loupe_is_asked_and_read_without_a_mouse(server: Server, page: Page) -> None:
    open_page(page, server)
    tab_to(page, page.locator("#loupe textarea"))
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("One day a fox")
    tab_to(page, page.get_by_role("button", name="Compare"))
    page.keyboard.press("Enter")
    expect(page.locator("#loupe")).to_contain_text("Done.")
    assert server.stage.calls[0].requests[0].prompt == "One day a fox"
    tab_to(page, page.get_by_role("region", name="Answer of nf4"))
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".inspector")).to_contain_text("nf4, token 2: “ in”")
    expect(column(page, "bf16").locator(".here")).to_have_text(" in")


def test_the_key_is_asked_for_and_put_away_by_keyboard(server: Server, page: Page) -> None:
    open_page(page, server)
    button = page.get_by_role("button", name="Key …")
    tab_to(page, button)
    page.keyboard.press("Enter")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(button).to_be_focused()
