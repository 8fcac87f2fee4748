"""The pictures in docs/images, of a real server under load. By hand: `python tests/dashboard/photograph.py`.

Serves what `make serve` serves (or uses `--url`) and sends it traffic with `loadtest`. For a minute an experiment deals
to every precision; then int8 is rolled out, and the page is taken as it stands: light and dark, the loupe after an
answer, and a phone. `--whole` takes whole pages, to look at. `--out FOLDER` puts the pictures elsewhere. Says what the
browser's console said.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.running import Halftone  # noqa: E402

DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
SPLIT = {"bf16": 40, "int8": 20, "nf4": 20, "gptq4": 20}


@contextmanager
def traffic(url: str) -> Iterator[None]:
    """Sixty users who write at their own times."""
    command = [sys.executable, "-m", "loadtest", "run", "--url", url, "--model", "storyteller", "--quiet"]
    command += ["--rate", "4", "--users", "60", "--prompt-tokens", "lognormal:48,0.6", "--temperature", "0.6"]
    command += ["--output-tokens", "lognormal:64,0.5", "--duration", "20m"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def order(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{url}/admin/{path}", json=body, timeout=30).raise_for_status().json()
    return answer


def compare_precisions(url: str, seconds: float) -> None:
    """An experiment, from its start to its end."""
    shown = httpx.get(f"{url}/admin/experiments", timeout=30).raise_for_status().json()
    plan = {"name": f"precisions-{len(shown['experiments']) + 1}", "weights": SPLIT, "duration_s": seconds}
    order(url, "experiments", plan | {"settle_s": 5, "block_s": 5, "price_per_hour": 0.4})
    while httpx.get(f"{url}/admin/experiments", timeout=30).raise_for_status().json()["active"]:
        time.sleep(1)


def roll_out(url: str, seconds: float) -> None:
    """A rollout that is in its first step after so long, and some guards of which have spoken."""
    steps = [{"weight": 30, "hold_s": 10 * seconds}, {"weight": 50, "gate": "approval"}]
    order(url, "rollouts", {"to": "int8", "steps": steps, "settle_s": 5, "block_s": 5, "by": "photograph"})
    time.sleep(seconds)


def picture(page: Page, path: Path, last: str, whole: bool) -> None:
    """From the top of the page to the end of the panel `last`."""
    box = page.locator(last).bounding_box()
    assert box is not None
    view = page.viewport_size
    assert view is not None
    scrolled = page.evaluate("scrollY")
    clip = {"x": 0, "y": 0, "width": view["width"], "height": box["y"] + scrolled + box["height"] + 12}
    page.screenshot(path=path, full_page=True, **({} if whole else {"clip": clip}))
    print(path)


def compare(page: Page) -> None:
    """One prompt through every variant; a token is looked at where the last of them parts from the reference."""
    page.set_viewport_size({"width": DESK["width"], "height": 1200})  # an element is taken whole only where it fits
    page.get_by_label("one after another").check()
    page.get_by_role("button", name="Compare").click()
    page.locator("#loupe").get_by_text("Done.").wait_for(timeout=60_000)
    page.locator("#loupe").scroll_into_view_if_needed()
    page.locator("#loupe .diverged").last.dispatch_event("pointerover")


def photograph(url: str, folder: Path, look_s: float, whole: bool) -> list[str]:
    """Returns what the browser complained of."""
    said: list[str] = []
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        looks = {"phone": ("light", PHONE, 2), "dashboard-dark": ("dark", DESK, 1), "dashboard": ("light", DESK, 1)}
        pages = {}
        for name, (scheme, size, scale) in looks.items():
            context = browser.new_context(color_scheme=scheme, viewport=size, device_scale_factor=scale)
            pages[name] = page = context.new_page()
            page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(f"{url}/dashboard")
        compare_precisions(url, look_s / 2)
        roll_out(url, look_s / 2)
        for name, page in pages.items():
            page.bring_to_front()
            page.wait_for_timeout(2_500)
            picture(page, folder / f"{name}.png", "#choice" if name == "phone" else "#rollouts", whole)
            if name != "dashboard":
                page.close()
        compare(pages["dashboard"])
        pages["dashboard"].locator("#loupe").screenshot(path=folder / "loupe.png")
        print(folder / "loupe.png")
        browser.close()
    return said


def main() -> None:
    options = ArgumentParser(description=__doc__)
    options.add_argument("--url", help="of a server that runs already")
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options.add_argument("--look-s", type=float, default=120.0, help="how long the page is open before the pictures")
    options.add_argument("--whole", action="store_true", help="whole pages")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.url:
        said = run(given.url, given)
    else:
        with Halftone() as server:
            said = run(server.url, given)
    print("\n".join(said) or "The console stayed silent.")


def run(url: str, given: Any) -> list[str]:
    with traffic(url):
        return photograph(url, given.out, given.look_s, given.whole)


if __name__ == "__main__":
    main()
