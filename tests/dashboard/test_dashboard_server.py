"""The page in front of a whole server: what a new user does in the first minute."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.dashboard.conftest import playwright
from tests.running import Halftone

pytestmark = [pytest.mark.cluster, pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(400)]
expect = playwright.expect

CONFIG = """
model: {name: storyteller, source: "builtin:storyteller"}
variants:
  - {name: fp32, recipe: fp32}
  - {name: nf4, recipe: nf4}
  - {name: broken, recipe: bf16, source: SOURCE}
traffic: {stable: fp32, weights: {fp32: 80, nf4: 20, broken: 0}}
drift: {reference: fp32, sample_rate: 0.05}
"""


@pytest.fixture(scope="module")
def running(browser: playwright.Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Halftone]:
    """After the browser: where there is none, no cluster starts for nothing."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "empty").mkdir()
    (folder / "config.yaml").write_text(CONFIG.replace("SOURCE", str(folder / "empty")))
    with Halftone(str(folder / "config.yaml")) as server:
        yield server


def column(page: playwright.Page, variant: str) -> playwright.Locator:
    return page.locator("article.column").filter(has=page.get_by_role("heading", name=variant))


def test_a_new_user_compares_changes_the_split_and_sees_it_served(running: Halftone, page: playwright.Page) -> None:
    page.goto(running.announced["urls"]["dashboard"])
    expect(page.locator("#status")).to_contain_text("2 of 3 variants ready")
    expect(page.locator("tr.absent")).to_contain_text("config.json")

    # Where all of them arrive in one read the page tells a lower bound of the speed.
    page.get_by_role("spinbutton", name="Tokens").fill("120")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#loupe")).to_contain_text("Done.", timeout=60_000)
    whole = answer(running, "storyteller@nf4", 120)
    expect(column(page, "nf4").locator(".tokens")).to_have_text(whole)
    expect(column(page, "nf4").locator(".diverged")).to_have_count(1)
    expect(column(page, "nf4")).to_contain_text("tokens are the reference's first choice")
    expect(column(page, "nf4").get_by_text("tokens/s").locator("+ dd")).to_have_text(re.compile(r"^(≥\s)?[\d,.]+$"))
    expect(column(page, "fp32").locator(".diverged")).to_have_count(0)

    page.get_by_role("slider", name="Share of nf4").fill("100")
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_role("img", name="Configured: nf4 100 %")).to_be_visible()
    before = running.metric("request_success_total", variant="nf4")
    for _ in range(5):
        answer(running, "storyteller", 2)
    assert running.metric("request_success_total", variant="nf4") == before + 5
    expect(page.locator("#traffic .totals")).to_contain_text("tokens/s")


def test_a_rollout_is_steered_from_the_page(running: Halftone, page: playwright.Page) -> None:
    httpx.put(f"{running.url}/admin/traffic", json={"weights": {"fp32": 100, "nf4": 0, "broken": 0}}).raise_for_status()
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(running.announced["urls"]["dashboard"])
    panel = page.locator("#rollouts")
    page.get_by_label("Canary").select_option("nf4")
    page.get_by_label("Steps, percent").fill("40, 50")
    page.get_by_role("button", name="What would it need?").click()
    expect(panel.get_by_role("status")).to_contain_text(re.compile(r"\d"))
    page.get_by_role("button", name="Start", exact=True).click()
    expect(panel).to_contain_text("1 of 2 (40 %, 50 %)")
    expect(page.get_by_role("img", name="Configured: fp32 60 %, nf4 40 %")).to_be_visible()
    for button, phase in (("Pause", "holding"), ("Resume", "progressing"), ("Abort", "aborted")):
        page.get_by_role("button", name=button).click()
        expect(panel.locator(".facts")).to_contain_text(f"phase{phase}")
        assert newest(running)["phase"] == phase
    expect(page.get_by_role("img", name="Configured: fp32 100 %")).to_be_visible()
    assert newest(running)["ended"]


def newest(running: Halftone) -> dict[str, Any]:
    return dict(httpx.get(f"{running.url}/admin/rollouts", timeout=10).raise_for_status().json()["rollouts"][0])


def answer(running: Halftone, model: str, tokens: int) -> str:
    prompt = "Once upon a time, there was a little fox who"
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    response = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60)
    return str(response.raise_for_status().json()["choices"][0]["text"])
