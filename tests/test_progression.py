"""A rollout on a running controller: evidence kept before it counts, moves written down before they act, nothing lost.

The controller, the store (SQLite in a file) and the judge are real; replicas and ingresses are reports, time is ours.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve import office as office_module
from serve.api.app import create_app
from serve.config import Config, parse_config
from serve.controller import Controller
from serve.errors import ConfigError, Conflict, HalftoneError, NotFound
from serve.heartbeat import IngressBeat, ReplicaBeat, State
from serve.metrics import Recorder
from serve.office import News
from serve.progression import Progression
from serve.rollout import Batch, Outcome, Split, assign
from serve.rollout.store import Store, StoreUnavailable

PLAN: dict[str, Any] = {
    "to": "int8",
    "steps": [{"weight": 10, "min_samples": 20, "hold_s": 5}, {"weight": 50, "min_samples": 20, "hold_s": 5}],
    "guards": {"error_rate": 0.05, **dict.fromkeys(("degenerate", "ttft", "itl", "e2e", "e2e_own_load"))}
    | dict.fromkeys(("output_length", "kl_divergence", "top1_agreement")),
    "block_s": 1.0,
    "settle_s": 0.0,
}


def config(folder: Path, **more: Any) -> Config:
    return parse_config(
        {
            "model": {"name": "m", "source": "builtin:storyteller"},
            "variants": [{"name": name, "recipe": name} for name in ("bf16", "int8", "nf4")],
            "traffic": {"weights": {"bf16": 100}},
            "drift": {"sample_rate": 0.05},
            "rollouts": {"store": f"sqlite:///{folder / 'rollouts.db'}"},
            **more,
        }
    )


class House:
    """One controller process with its rollouts, and one ingress that deals as it is told and fails as it is told."""

    def __init__(self, config: Config, name: str = "one", now_s: float = 1000.0) -> None:
        self.now_s = now_s
        self.name = name
        self.news: list[News] = []
        self.controller = Controller(config, lambda: self.now_s)
        self.progression = Progression(config, self.controller, lambda: self.now_s, self.news.append)
        self.split: Split | None = None
        self.failing: set[str] = set()
        self._records = 0
        self.sequence = 0

    async def open(self) -> House:
        await self.progression.open()
        await self.replicas()
        await self.seconds(1, requests=0)
        return self

    async def replicas(self, **states: State) -> None:
        for name in ("bf16", "int8", "nf4"):
            beat = ReplicaBeat(f"{self.name}-{name}", name, states.get(name, "ready"), reason="no file")
            self.controller.replica(beat)

    async def seconds(self, count: int, requests: int = 20) -> list[bool]:
        """Let time pass, with so many requests in each second; whether each parcel was counted."""
        counted = []
        for _ in range(count):
            self.now_s += 1.0
            await self.replicas()
            counted.append(await self.beat(requests))
            await self.progression.tick()
        return counted

    async def beat(self, requests: int = 0) -> bool:
        self.sequence += 1
        batch = Batch(f"{self.name}-ingress", self.sequence, self.now_s, tuple(map(self._outcome, range(requests))))
        snapshot = Recorder().snapshot()
        self.controller.ingress(IngressBeat(batch.ingress, batch, snapshot, self.split))
        counted = await self.progression.take(batch)
        self.split = self.controller.view().split
        return counted

    def _outcome(self, _: int) -> Outcome:
        assert self.split is not None
        self._records += 1
        unit = f"{self._records % 400:016x}"
        variant = assign(self.split, unit, "").variant
        return Outcome(
            self._records, variant, "sticky", self.split.revision, self.now_s, unit, self.now_s,
            error="internal" if variant in self.failing else None, completion_tokens=5, e2e_s=0.1, ttft_s=0.05,
        )  # fmt: skip

    @property
    def weights(self) -> Mapping[str, float]:
        return self.controller.view().split.weights

    async def phase(self, id: str = "r1") -> str:
        return str((await self.progression.show(id))["phase"])


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    made = await House(config(tmp_path)).open()
    yield made
    await made.progression.close()


async def test_a_good_canary_walks_through_its_steps_and_becomes_stable(house: House) -> None:
    started = await house.progression.start(PLAN)
    assert (started["id"], started["phase"], house.weights["int8"]) == ("r1", "progressing", 10.0)
    seen = []
    for _ in range(60):
        await house.seconds(1)
        seen.append(house.weights["int8"])
    assert list(dict.fromkeys(seen)) == [10.0, 50.0, 100.0]
    assert house.controller.view().split.stable == "int8"
    shown = await house.progression.show("r1")
    assert (shown["phase"], shown["ended"], shown["verdict"]["result"]) == ("succeeded", True, "pass")
    assert [line["phase"] for line in shown["lines"] if line["phase"]] == [
        "progressing", "progressing", "promoting", "succeeded",
    ]  # fmt: skip
    assert [n.entry.facts["to"] for n in house.news if n.entry.kind == "transition"][-1] == "succeeded"


async def test_rollback_is_in_the_very_answer_to_the_parcel_that_proved_it(house: House) -> None:
    await house.progression.start(PLAN)
    await house.seconds(3)
    house.failing = {"int8"}
    for _ in range(60):
        house.now_s += 1.0
        await house.beat(20)
        if house.split is not None and house.split.weights["int8"] == 0.0:
            break
    assert house.weights == {"bf16": 100.0, "int8": 0.0, "nf4": 0.0}
    await house.seconds(2)
    shown = await house.progression.show("r1")
    assert (shown["phase"], shown["decisive"]) == ("rolled_back", "error_rate")


async def test_what_is_seen_of_it_is_told_to_prometheus(house: House) -> None:
    await house.progression.start(PLAN)
    await house.seconds(2)
    text = house.controller.metrics(
        IngressBeat("x", Batch("x", 1, 0.0), Recorder().snapshot()), house.progression.snapshot()
    )
    int8 = 'model_name="m",phase="{}",precision="int8",variant="int8"'
    assert f"halftone_rollout_phase{{{int8.format('progressing')}}} 1.0" in text
    assert f"halftone_rollout_phase{{{int8.format('holding')}}} 0.0" in text
    assert 'rollout_verdicts_total{model_name="m",precision="int8",variant="int8",verdict="no_data"} 1.0' in text


async def test_a_killed_controller_is_resumed_at_the_same_step_with_the_same_evidence(tmp_path: Path) -> None:
    first = await House(config(tmp_path)).open()
    await first.progression.start(PLAN)
    await first.seconds(8)
    before = await first.progression.show("r1")
    second = House(config(tmp_path), "two", first.now_s + 1.0)
    await second.progression.open()
    assert second.weights["int8"] == before["weight"] > 0  # dealt before the dead one's lease has run out
    assert set(await second.seconds(8, requests=0)) == {False, True}  # and nothing is counted until then
    again = await second.progression.show("r1")
    for key in ("phase", "step", "weight", "n_step", "split", "plan"):
        assert again[key] == before[key]
    whole = [house.progression._office.whole("r1") for house in (first, second)]
    told = [{**rollout.to_dict()["evidence"], "senders": None} for rollout in whole]
    assert json.dumps(told[0]) == json.dumps(told[1])
    await second.seconds(60)
    assert await second.phase() == "succeeded"
    # The first was only asleep. It may not write any more, hence not act.
    first.now_s = second.now_s
    assert await first.seconds(2) == [False, False]
    with pytest.raises(HalftoneError, match="another controller is in office"):
        await first.progression.start({"to": "nf4"})
    for each in (first, second):
        await each.progression.close()


async def test_without_its_store_the_split_stays_and_nothing_counts_until_it_is_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.progression.start(PLAN)
    await house.seconds(3)
    seen = (await house.progression.show("r1"))["n_step"]

    def broken(*_: object) -> None:
        raise StoreUnavailable("the rollout store does not answer: disk full")

    with monkeypatch.context() as patch:
        for method in ("keep", "commit", "acquire"):
            patch.setattr(Store, method, broken)
        assert await house.seconds(3) == [False] * 3
        assert house.weights["int8"] == 10.0
        with pytest.raises(HalftoneError, match="disk full"):
            await house.progression.order("r1", "pause", "ada")
        with pytest.raises(Conflict, match="abort it first"):
            house.progression.require_idle("dealing traffic by hand")
    assert await house.seconds(1, requests=0) == [True]
    assert (await house.progression.show("r1"))["n_step"] == seen
    await house.seconds(60)
    assert await house.phase() == "succeeded"


async def test_a_replica_that_dies_is_an_incident_at_once(house: House) -> None:
    await house.progression.start(PLAN)
    await house.seconds(2)
    house.controller.replica(ReplicaBeat("its-successor", "int8", "loading"))
    await house.seconds(1, requests=0)
    assert house.weights["int8"] == 0.0
    assert (await house.progression.show("r1"))["decisive"] == "crash"


async def test_a_death_that_only_an_ingress_saw_is_one_too_and_nobody_is_sent_there(house: House) -> None:
    await house.progression.start(PLAN)
    await house.seconds(2)
    batch = Batch("one-ingress", house.sequence + 1, house.now_s)
    beat = IngressBeat("one-ingress", batch, Recorder().snapshot(), house.split, {"int8": 1})
    view = house.controller.ingress(beat)
    assert {state.name: state.state for state in view.variants}["int8"] == "loading"
    await house.progression.take(batch)
    await house.progression.tick()
    assert house.weights["int8"] == 0.0
    assert await house.phase() == "rolling_back"  # until every ingress deals so
    await house.seconds(2, requests=0)
    assert await house.phase() == "rolled_back"


async def test_the_death_of_a_stable_replica_is_no_incident_of_the_canary(house: House) -> None:
    await house.progression.start(PLAN)
    await house.seconds(2)
    house.controller.replica(ReplicaBeat("its-successor", "bf16", "loading"))
    await house.seconds(2, requests=0)
    assert await house.phase() == "progressing"


async def test_a_canary_that_cannot_be_loaded_fails_before_it_has_traffic(house: House) -> None:
    await house.replicas(int8="failed")
    await house.progression.start(PLAN)
    await house.progression.tick()
    shown = await house.progression.show("r1")
    assert shown["phase"] == "failed"
    assert "no file" in shown["sentence"]


async def test_a_guard_that_nothing_here_measures_is_refused_with_the_remedy(tmp_path: Path) -> None:
    house = await House(config(tmp_path, drift={"sample_rate": 0.0})).open()
    with pytest.raises(ConfigError, match=r"kl_divergence: this server scores no live quality.*--guard NAME=off"):
        await house.progression.start({"to": "int8"})
    assert (await house.progression.start({"to": "int8", "dry_run": True}))["needs"]
    assert (await house.progression.start(PLAN))["phase"] == "progressing"
    await house.progression.close()


async def test_a_new_target_restarts_it_and_traffic_is_not_to_be_moved_beside_it(house: House) -> None:
    await house.progression.start(PLAN)
    with pytest.raises(Conflict, match="rollout r1 to int8 runs"):
        house.progression.require_idle("an experiment")
    await house.progression.start({**PLAN, "to": "nf4"})
    rows = (await house.progression.all())["rollouts"]
    assert [(row["id"], row["canary"], row["phase"]) for row in rows] == [
        ("r2", "nf4", "progressing"),
        ("r1", "int8", "aborted"),
    ]
    assert house.weights == {"bf16": 90.0, "int8": 0.0, "nf4": 10.0}
    await house.progression.order("r2", "abort", "ada")
    house.progression.require_idle("an experiment")
    with pytest.raises(Conflict, match="aborted: start a new one"):
        await house.progression.order("r2", "resume", "ada")
    with pytest.raises(NotFound, match="known: r1, r2"):
        await house.progression.show("r9")


async def test_promotion_frees_the_old_variant_and_a_new_rollout_has_it_load_again(tmp_path: Path) -> None:
    house = await House(config(tmp_path)).open()
    await house.progression.start({**PLAN, "free_stable": True})
    await house.seconds(60)

    def is_resident(variant: str, at: House = house) -> bool:
        return at.controller.replica(ReplicaBeat(f"{at.name}-{variant}", variant, "ready")).resident

    assert await house.phase() == "succeeded"
    assert (is_resident("bf16"), is_resident("int8")) == (False, True)
    await house.progression.close()
    again = await House(config(tmp_path), "two").open()
    assert (is_resident("bf16", again), is_resident("int8", again)) == (False, True)
    await again.replicas(bf16="loading")
    started = await again.progression.start({**PLAN, "to": "bf16"})
    assert (started["stable"], started["phase"]) == ("int8", "pending")
    assert is_resident("bf16", again)
    await again.seconds(1)
    assert await again.phase("r2") == "progressing"
    await again.progression.close()


async def test_a_canary_is_kept_for_inspection_and_freed_after_its_time(house: House) -> None:
    await house.progression.start({**PLAN, "keep_canary_s": 100.0})
    await house.progression.order("r1", "abort", "ada")
    for waited_s, resident in ((90.0, True), (20.0, False)):
        house.now_s += waited_s
        await house.seconds(1, requests=0)
        assert house.controller.replica(ReplicaBeat("one-int8", "int8", "ready")).resident == resident
    view = house.controller.set_traffic({"bf16": 50, "int8": 50})
    await house.progression.moved_by_hand(view.split)
    assert house.controller.replica(ReplicaBeat("one-int8", "int8", "ready")).resident


async def test_traffic_moved_by_hand_is_remembered_until_the_configuration_is_edited(tmp_path: Path) -> None:
    first = await House(config(tmp_path)).open()
    view = first.controller.set_traffic({"bf16": 30, "int8": 70})
    await first.progression.moved_by_hand(view.split)
    await first.progression.close()
    for edited, expected in (({}, 70.0), ({"traffic": {"weights": {"bf16": 60, "int8": 40}}}, 40.0)):
        again = House(config(tmp_path, **edited), "two")
        await again.progression.open()
        assert again.weights["int8"] == expected
        await again.progression.close()


async def test_traffic_without_a_rollout_is_recorded_within_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = {"store": f"sqlite:///{tmp_path / 'rollouts.db'}", "recorded_parcels": 3}
    house = await House(config(tmp_path, rollouts=store)).open()
    await house.seconds(102, requests=1)
    told = await house.progression.recorded("traffic")
    assert (told["stable"], told["plan"]) == ("bf16", None)
    assert 3 <= len(told["outcomes"]) <= 5
    await house.progression.close()


async def test_over_http_with_the_shapes_that_are_documented(house: House) -> None:
    app = create_app(None, rollouts=house.progression)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1/admin") as client:
        preview = (await client.post("/rollouts", json={**PLAN, "dry_run": True})).json()
        assert set(preview) >= {"plan", "expected_from", "needs"}
        assert preview["needs"]["total_requests"] > 100
        assert (await client.get("/rollouts")).json() == {"active": None, "rollouts": []}
        started = (await client.post("/rollouts", json={**PLAN, "by": "ada"})).json()
        assert set(started) >= {"plan", "split", "n_step", "lines", "needs", "expected_from", "verdict", "sentence"}
        assert (await client.get("/rollouts")).json()["active"] == "r1"
        assert (await client.post("/rollouts/r1/approve", json={})).status_code == 409
        paused = (await client.post("/rollouts/r1/pause", json={"by": "ada"})).json()
        assert (paused["phase"], paused["paused"]) == ("holding", True)
        lines = (await client.get("/rollouts/r1/history")).json()["lines"]
        assert "paused by ada" in [line["sentence"] for line in lines]
        assert (await client.get("/rollouts/r7")).status_code == 404
        wrong = await client.post("/rollouts", json={"to": "int8", "stepz": []})
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "rollout.stepz"
        assert (await client.post("/rollouts/r1/explode", json={})).status_code in (404, 422)


def test_the_default_store_is_one_file_per_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFTONE_STATE", str(tmp_path / "state"))
    assert office_module.default_store("org/my model") == f"sqlite:///{tmp_path}/state/rollouts-org_my_model.db"
