"""`halftone rollout` against a server in this process: the real rim, controller, office and store; nobody generates."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

from serve.api import ApiSettings, Keys
from serve.api.app import create_app
from serve.cli import app
from serve.errors import SetupError
from tests.api.scripted import ScriptedBackend
from tests.rollout.replay import outcomes
from tests.rollout.simulation import Effect, World, simulate
from tests.running import free_port
from tests.test_progression import House, config

KEY = "an-admin-key"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, ready, stop = free_port(), threading.Event(), threading.Event()

    async def serve() -> None:
        house = await House(config(tmp_path_factory.mktemp("store"))).open()
        application = create_app(ScriptedBackend(), ApiSettings(keys=Keys.of(admin=KEY)), house.progression)
        server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="error", lifespan="off"))
        running = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        ready.set()
        while not stop.is_set():
            house.now_s += 0.05
            await house.beat()
            await asyncio.sleep(0.05)
        server.should_exit = True
        await running
        await house.progression.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(20)
    yield f"http://127.0.0.1:{port}"
    stop.set()
    thread.join()


def run(url: str, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["rollout", *arguments, "--url", url, "--admin-key", KEY])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def answer(url: str, *arguments: str) -> Any:
    return json.loads(run(url, *arguments, "--json"))


def refusal(url: str, *arguments: str) -> str:
    with pytest.raises(SetupError) as refused:
        run(url, *arguments)
    assert "\n" not in refused.value.message
    return refused.value.message


def test_a_rollout_from_dry_run_to_abort(url: str, tmp_path: Path) -> None:
    assert "no rollout yet" in run(url, "history")
    assert "there was no rollout yet" in refusal(url, "status")
    preview = answer(
        url, "start", "--to", "int8", "--dry-run", "--step", "5:50:10", "--step", "50", "--guard", "ttft=0.2"
    )
    assert [(step["weight"], step["min_samples"]) for step in preview["plan"]["steps"]] == [(5, 50), (50, 200)]
    assert preview["plan"]["guards"]["ttft"]["margin"] == 0.2
    assert preview["plan"]["guards"]["ttft"]["weight"] == 0.09  # the rest of the default guard stays
    shown = run(url, "start", "--to", "int8", "--dry-run")
    assert "requests to int8" in shown
    assert "error_rate" in shown
    plan = tmp_path / "plan.yaml"
    plan.write_text("to: int8\nsteps: [5, {weight: 50}]\nguards: {kl_divergence: {cap: 0.06}, flips: null}\n")
    started = answer(url, "start", "--plan", str(plan), "--approval", "--by", "ada", "--shadow", "0.5")
    id = started["id"]
    assert (started["phase"], started["shadow_rate"], started["weight"]) == ("shadowing", 0.5, 0.0)
    assert started["plan"]["guards"]["kl_divergence"]["cap"] == 0.06
    assert [step["gate"] for step in started["plan"]["steps"]] == ["none", "approval"]
    assert "shadowing, mirroring" in run(url, "status")
    assert answer(url, "pause")["paused"]
    assert "nothing waits for approval" in refusal(url, "approve")
    assert answer(url, "resume", id)["phase"] == "shadowing"
    assert answer(url, "abort", "--by", "ada")["phase"] == "aborted"
    assert "no rollout runs" in refusal(url, "pause")
    assert "aborted by ada" in run(url, "history", id)
    assert "ended by hand" in run(url, "explain")
    assert answer(url, "history")["rollouts"][0]["id"] == id


def test_what_is_expected_comes_from_an_evaluation(url: str, tmp_path: Path) -> None:
    evaluated = tmp_path / "evaluation.json"
    rows = [{"recipe": "int8", "kl_divergence": {"mean": 0.004, "p50": 0.001}, "top1_agreement": 0.9}]
    evaluated.write_text(json.dumps({"reference": "fp32", "rows": [*rows, {"recipe": "nf4"}]}))
    preview = answer(url, "start", "--to", "int8", "--dry-run", "--expected", str(evaluated))
    assert preview["plan"]["guards"]["kl_divergence"]["expected"] == 0.004
    assert preview["plan"]["guards"]["top1_agreement"]["expected"] == 0.9
    assert "evaluation" in preview["expected_from"]
    assert "typical of int8" in answer(url, "start", "--to", "int8", "--dry-run")["expected_from"]
    assert "has no row for" in refusal(url, "start", "--to", "bf16", "--dry-run", "--expected", str(evaluated))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["start"], "--to"),
        (["start", "--to", "int9"], "unknown variant 'int9'"),
        (["start", "--to", "int8", "--step", "x"], "WEIGHT[:MIN_SAMPLES[:HOLD_S]]"),
        (["start", "--to", "int8", "--guard", "speed=1"], "rollout.guards.speed: unknown guard"),
        (["start", "--to", "int8", "--guard", "ttft"], "must be NAME=NUMBER"),
        (["status", "r99"], "no rollout 'r99'"),
        (["certify"], "nothing is recorded"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(url: str, arguments: list[str], told: str) -> None:
    assert told in refusal(url, *arguments)


def test_a_wrong_key_and_a_server_that_is_not_there_are_told_apart(url: str) -> None:
    with pytest.raises(SetupError, match="HALFTONE_ADMIN_KEY"):
        CliRunner().invoke(app, ["rollout", "status", "--url", url], catch_exceptions=False)
    with pytest.raises(SetupError, match=r"no server answers at http://127\.0\.0\.1:1 "):
        CliRunner().invoke(app, ["rollout", "status", "--url", "http://127.0.0.1:1"], catch_exceptions=False)


def test_certify_replays_what_the_server_recorded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = simulate(World(users=200), Effect(), rollouts=1, requests=1200, steps=((0, 0.0),), seed=4)
    kept = [outcome.to_dict() for outcome in outcomes(arrivals)]
    told = {"id": "traffic", "stable": "bf16", "plan": None, "outcomes": kept}
    monkeypatch.setattr("serve.commands.admin_client.AdminClient.get", lambda self, path: told)
    certificate = answer(url, "certify", "--replays", "1")
    assert certificate["outcomes"] == 1200
    assert certificate["rows"][0]["effect"] == "none"
    assert "rolls back falsely" in certificate["sentence"]
