"""The YAML files in deployments/ deploy what they say, through Ray Serve's own door."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from serve.config import parse_config
from tests.running import free_port

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "deployments/serve.yaml"


def application() -> dict[str, Any]:
    (only,) = yaml.safe_load(FILE.read_text())["applications"]
    return dict(only)


def test_what_is_deployed_on_a_cluster_is_what_runs_locally() -> None:
    local = parse_config(yaml.safe_load((ROOT / "deployments/local.yaml").read_text()))
    assert parse_config(application()["args"]["config"]) == local


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`serve run` of the file, on a free port, with one narrow variant instead of all."""
    document = yaml.safe_load(FILE.read_text())
    port = document["http_options"]["port"] = free_port()
    narrow = {"name": "a", "recipe": "int8", "engine": {"max_num_seqs": 1, "max_queue": 1}}
    document["applications"][0]["args"]["config"] |= {"variants": [narrow], "traffic": {"stable": "a"}, "drift": {}}
    file = tmp_path_factory.mktemp("serve") / "serve.yaml"
    file.write_text(yaml.safe_dump(document))
    process = subprocess.Popen(
        [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_ready(f"http://127.0.0.1:{port}/ready", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            _, left = psutil.wait_procs([psutil.Process(process.pid), *family], timeout=20)
            for stubborn in left:
                stubborn.kill()
        process.wait(10)


def _wait_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 180
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if httpx.get(address, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"not ready; exit code {process.poll()}")


@pytest.mark.cluster
@pytest.mark.slow
async def test_serves_own_proxy_keeps_the_contract_of_errors_and_disclosure(url: str) -> None:
    body = {"model": "storyteller", "prompt": "Once", "max_tokens": 100, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=120) as client:
        answers = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for _ in range(8)))
        unknown = await client.post(f"{url}/v1/completions", json={**body, "model": "gpt"})
        async with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as streamed:
            lines = [line async for line in streamed.aiter_lines() if line]
    assert {answer.headers["x-halftone-variant"] for answer in answers} == {"a"}
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < 8
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(429, "1")}
    assert unknown.status_code == 404
    assert "storyteller@a" in unknown.json()["error"]["message"]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 50
