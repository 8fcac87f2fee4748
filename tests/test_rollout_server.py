"""Rollouts on a real local Ray cluster under load: promoted, crashed and rolled back, killed and resumed.

One server for the tests of this file, of which each finds what it needs or brings it about; only the last one starts a
second, after killing all.
Minimum samples, hold times and margins are as small as statistics allow; the margins of latencies are wide, for the
machine may be busy with other things.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.running import Halftone

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

CONFIG = """
model: {name: storyteller, source: "builtin:storyteller"}
variants:
  - {name: fp32, recipe: fp32}
  - {name: int8, recipe: int8}
  - {name: damaged, recipe: int8, source: DAMAGED}
traffic: {stable: fp32, weights: {fp32: 100}}
drift: {reference: fp32, sample_rate: 1.0}
"""
OFF = dict.fromkeys(
    ("degenerate", "e2e_own_load", "output_length", "kl_divergence", "top1_agreement", "ttft", "itl",
     "perplexity_ratio", "flips"),  # the last two are on where somebody has evaluated the variant on this machine
)  # fmt: skip
PLAN: dict[str, Any] = {
    "guards": {**OFF, "error_rate": 0.2, "e2e": {"margin": 9.0}},
    "block_s": 0.5,
    "settle_s": 0.0,
    "steps": [{"weight": 30, "min_samples": 20, "hold_s": 1}, {"weight": 60, "min_samples": 20, "hold_s": 1}],
}
SLOW = {**PLAN, "steps": [{"weight": 50, "min_samples": 100_000, "hold_s": 1}]}


@dataclass
class Load:
    """Some users who ask again and again, each as soon as the last answer has come."""

    url: str
    users: int = 6
    seen: list[tuple[float, int, str]] = field(default_factory=list)  # asked at, status, variant
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._ask, args=(user,)) for user in range(self.users)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, user: int) -> None:
        count = 0
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                count += 1
                body = {"model": "storyteller", "prompt": "Once", "max_tokens": 4, "user": f"{user} {count % 50}"}
                asked_s = time.time()
                answer = client.post(f"{self.url}/v1/completions", json=body)
                self.seen.append((asked_s, answer.status_code, answer.headers.get("x-halftone-variant", "")))
                time.sleep(0.02)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(state: Path) -> Iterator[Halftone]:
    damage(state / "damaged")
    (state / "config.yaml").write_text(CONFIG.replace("DAMAGED", str(state / "damaged")))
    with Halftone(str(state / "config.yaml"), state=state) as running:
        yield running


def damage(folder: Path) -> None:
    """The embedded model with most of its layers missing: faster than it should be, and wrong."""
    from safetensors.torch import load_file, save_file

    from serve.compression.source import find_source

    shutil.copytree(find_source("builtin:storyteller"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 2
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    (weights,) = folder.glob("*.safetensors")
    kept = {
        name: tensor
        for name, tensor in load_file(weights).items()
        if not (layer := re.search(r"\.layers\.(\d+)\.", name)) or int(layer[1]) < 2
    }
    save_file(kept, weights, {"format": "pt"})


def start(server: Halftone, to: str, plan: dict[str, Any]) -> str:
    answer = httpx.post(f"{server.url}/admin/rollouts", json={**plan, "to": to}, timeout=30)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def show(server: Halftone, id: str) -> dict[str, Any]:
    """DETAIL; empty while nobody answers."""
    try:
        answer = httpx.get(f"{server.url}/admin/rollouts/{id}", timeout=10)
    except httpx.HTTPError:
        return {}
    return dict(answer.json()) if answer.status_code == 200 else {}


def variants(server: Halftone) -> dict[str, Any]:
    return {row["name"]: row for row in httpx.get(f"{server.url}/admin/variants", timeout=10).json()["variants"]}


def until(server: Halftone, id: str, *phases: str, timeout_s: float = 120.0) -> dict[str, Any]:
    server.wait_until(lambda: show(server, id).get("phase") in phases, timeout_s)
    return show(server, id)


def test_a_damaged_canary_is_rolled_back_on_its_divergence_though_it_is_faster(server: Halftone) -> None:
    guards = {**OFF, "error_rate": 0.2, "e2e": {"margin": 9.0}, "kl_divergence": {"margin": 0.05}}
    with Load(server.url):
        id = start(server, "damaged", {**SLOW, "guards": guards})
        told = until(server, id, "rolled_back", "succeeded", "failed")
    assert (told["phase"], told["decisive"]) == ("rolled_back", "kl_divergence"), told["sentence"]
    findings = {finding["guard"]: finding for finding in told["verdict"]["findings"]}
    assert findings["kl_divergence"]["estimate"] > 0.1
    assert findings["e2e"]["estimate"] < 0.0


def test_int8_is_promoted_through_all_steps_under_load(server: Halftone) -> None:
    with Load(server.url) as load:
        server.wait_until(lambda: len(load.seen) > 20, 60)
        id = start(server, "int8", {**PLAN, "free_stable": True})
        told = until(server, id, "succeeded", "rolled_back", "failed")
        before = len(load.seen)
        server.wait_until(lambda: len(load.seen) > before + 40)
    assert told["phase"] == "succeeded", told["sentence"]
    moves = [(line["phase"], line["weight"]) for line in told["lines"] if line["phase"]]
    assert moves == [("progressing", 30.0), ("progressing", 60.0), ("promoting", 100.0), ("succeeded", 100.0)]
    assert {status for _, status, _ in load.seen} == {200}
    assert {variant for _, _, variant in load.seen[before + load.users :]} == {"int8"}
    assert httpx.get(f"{server.url}/admin/traffic").json()["stable"] == "int8"
    server.wait_until(lambda: variants(server)["fp32"]["state"] == "freed")
    assert not variants(server)["fp32"]["memory_bytes"]
    # Which the ingress hears of with its next report.
    server.wait_until(lambda: "gave its memory back" in pin_to_fp32(server).text)
    assert pin_to_fp32(server).status_code == 503


def promote_int8(server: Halftone) -> None:
    """Unless it is stable already."""
    if httpx.get(f"{server.url}/admin/traffic").json()["stable"] != "int8":
        with Load(server.url):
            assert until(server, start(server, "int8", PLAN), "succeeded", "rolled_back")["phase"] == "succeeded"


def pin_to_fp32(server: Halftone) -> httpx.Response:
    body = {"model": "storyteller@fp32", "prompt": "Once"}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)


def test_a_canary_that_crashes_again_and_again_is_rolled_back_at_once_and_nobody_is_lost(server: Halftone) -> None:
    promote_int8(server)
    with Load(server.url) as load:
        id = start(server, "fp32", SLOW)
        server.wait_until(lambda: sum(variant == "fp32" for _, _, variant in load.seen) > 10, 60)
        victim = server.worker("variant-fp32")
        killed_s = time.time()
        victim.kill()
        dead_s = time.time()
        until(server, id, "rolling_back", "rolled_back", timeout_s=20)
        for _ in range(3):
            time.sleep(1.0)
            for process in server.family():
                if ":variant-fp32" in "".join(_command(process)):
                    process.kill()
        told = until(server, id, "rolled_back")
    assert told["decisive"] == "crash"
    rolled_back_s = next(line["at_s"] for line in told["lines"] if line["phase"] == "rolling_back")
    assert rolled_back_s - killed_s < 5.0
    assert not [asked_s for asked_s, _, variant in load.seen if variant == "fp32" and asked_s > rolled_back_s + 2.0]
    lost = [(asked_s, status, variant) for asked_s, status, variant in load.seen if status != 200]
    assert len(lost) <= load.users  # those whose tokens had begun to come
    assert [what for what in lost if what[2] != "fp32" or what[0] > dead_s] == [], dead_s


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_a_killed_controller_goes_on_at_the_same_step_with_the_same_evidence(server: Halftone) -> None:
    promote_int8(server)
    server.wait_until(lambda: server.metric("replicas", variant="fp32", state="ready") == 1, 120)
    with Load(server.url, users=4) as load:
        id = start(server, "fp32", SLOW)
        server.wait_until(lambda: show(server, id)["n_step"]["canary"] > 20, 60)
        before = show(server, id)
        server.worker("controller").kill()
        server.wait_until(lambda: show(server, id).get("n_step", {}).get("canary", 0) > 0, 60)
        after = show(server, id)
        assert (after["phase"], after["step"], after["split"]) == ("progressing", 0, before["split"])
        assert after["n_step"]["canary"] >= before["n_step"]["canary"]
        assert after["n_step"]["stable"] >= before["n_step"]["stable"]
        server.wait_until(lambda: show(server, id)["n_step"]["canary"] > after["n_step"]["canary"] + 10, 60)
    assert {status for _, status, _ in load.seen} == {200}


def test_a_server_that_is_killed_whole_resumes_its_rollout_when_it_starts_again(server: Halftone, state: Path) -> None:
    promote_int8(server)
    rollouts = httpx.get(f"{server.url}/admin/rollouts").json()["rollouts"]
    id = next((row["id"] for row in rollouts if not row["ended"]), None) or start(server, "fp32", SLOW)
    counted: list[Any] = []

    def all_is_counted() -> bool:
        """The last records of the load come with the next beats: nothing new for three seconds."""
        counted.append((time.monotonic(), show(server, id)["n_step"]))
        return counted[-1][0] - next(at_s for at_s, n in counted if n == counted[-1][1]) > 3.0

    server.wait_until(all_is_counted)
    before = show(server, id)
    family = server.family()
    os.killpg(server.process.pid, signal.SIGKILL)
    for process in family:
        if process.is_running():
            process.kill()
    server.stop()
    with Halftone(str(state / "config.yaml"), state=state) as again:
        told = show(again, id)
        assert (told["phase"], told["step"], told["split"]) == ("progressing", 0, before["split"])
        assert told["n_step"] == before["n_step"]
        again.wait_until(lambda: server_takes_orders(again, id), 30)
        assert show(again, id)["phase"] == "aborted"


def server_takes_orders(server: Halftone, id: str) -> bool:
    """It is in office: the dead one's lease has run out."""
    return httpx.post(f"{server.url}/admin/rollouts/{id}/abort", json={}, timeout=10).status_code == 200
