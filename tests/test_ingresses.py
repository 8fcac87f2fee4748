"""Two ingress processes on one port: connections are dealt to both, and what they count together is what was sent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.running import ROOT, Halftone

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(200)]

CONFIG = """
model: {name: storyteller, source: "builtin:storyteller"}
variants:
  - {name: int8, recipe: int8}
  - {name: nf4, recipe: nf4}
traffic: {stable: int8, weights: {int8: 50, nf4: 50}}
energy: {co2_grams_per_kwh: 400}
api: {replicas: 2}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Halftone]:
    config = tmp_path_factory.mktemp("ingresses") / "config.yaml"
    config.write_text(CONFIG)
    with Halftone(str(config)) as running:
        yield running


def ingresses(server: Halftone) -> list[psutil.Process]:
    return [process for process in server.family() if ":ingress" in "".join(process.cmdline())]


def connections(process: psutil.Process, server: Halftone, status: str) -> int:
    return sum(each.status == status and each.laddr.port == server.port for each in process.net_connections("tcp"))


def test_what_two_ingresses_count_together_is_what_was_sent(server: Halftone, tmp_path: Path) -> None:
    processes = ingresses(server)
    assert [connections(process, server, psutil.CONN_LISTEN) for process in processes] == [1, 1]
    taken = dict.fromkeys(range(len(processes)), 0)
    body = {"model": "storyteller", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    sent = 0
    while min(taken.values()) < 3:  # the system deals connections by their port
        with httpx.Client() as client:
            client.post(f"{server.url}/v1/completions", json=body, timeout=30).raise_for_status()
            sent += 1
            for index, process in enumerate(processes):
                taken[index] += connections(process, server, psutil.CONN_ESTABLISHED)
        assert sent < 200, "all connections went to one ingress"
    assert sum(taken.values()) == sent
    counted = load(server, "--num-requests", "60", "--concurrency", "8", "--output-tokens", "10")
    requests = sent + sum(row["requests"]["succeeded"] for row in counted.values())
    tokens = 4 * sent + sum(row["completion_tokens"]["total"] for row in counted.values())
    server.wait_until(lambda: server.metric("request_success_total") == requests, timeout_s=10)
    assert server.metric("generation_tokens_total") == tokens
    assert server.metric("time_to_first_token_seconds_count") == requests
    assert server.metric("e2e_request_latency_seconds_count") == requests
    assert server.metric("request_errors_total") == 0


def test_no_count_falls_whichever_ingress_is_asked(server: Halftone) -> None:
    body = {"model": "storyteller", "prompt": [5, 6, 7], "max_tokens": 1}
    before = server.metric("request_success_total")
    for _ in range(20):  # each asks on a connection of its own
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).raise_for_status()
        now = server.metric("request_success_total")
        assert now >= before
        before = now


def test_energy_is_measured_or_said_to_be_unavailable_everywhere(server: Halftone) -> None:
    rows = {row["name"]: row for row in httpx.get(f"{server.url}/admin/variants").json()["variants"]}
    shown = httpx.get(f"{server.url}/metrics").text
    for energy in (row["energy"] for row in rows.values()):
        assert energy["co2_grams_per_kwh"] == 400
        if energy["joules"] is None:
            assert energy["measured"].startswith("unavailable: ")
            assert energy["joules_per_token"] is energy["co2_grams_per_million_tokens"] is None
            assert "halftone_energy_joules_total{" not in shown  # absent, not 0
        else:
            assert energy["joules_per_token"] > 0
            assert "halftone_energy_joules_total{" in shown


def load(server: Halftone, *options: str) -> dict[str, Any]:
    """What the load generator saw, by variant, nothing left out as warm-up."""
    command = [sys.executable, "-m", "loadtest", "run", "--url", server.url, "--model", "storyteller", "--warmup", "0"]
    done = subprocess.run([*command, *options, "--json"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["by_variant"])
