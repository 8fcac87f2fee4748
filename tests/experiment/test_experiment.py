"""An experiment's life: it owns the split while it runs, gives it back, and outlives whoever keeps it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from serve.errors import ConfigError, Conflict, NotFound
from serve.experiment import Facts, Laboratory, plan_for
from serve.experiment.store import DatabaseShelf
from serve.rollout import Split, assign
from tests.experiment.worlds import parcels

NAMES = ["bf16", "int8", "nf4"]
BASE = Split("bf16", {"bf16": 80.0, "int8": 20.0, "nf4": 0.0}, salt="s", holdout=3.0, shadow={"nf4": 0.1}, revision=7)
ASKED = {"name": "e", "weights": {"bf16": 50, "nf4": 50}, "settle_s": 0, "block_s": 1, "holdout": 10}


class Drawer:
    """A shelf that forgets nothing."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def put(self, name: str, document: str) -> None:
        self.kept[name] = document

    def documents(self) -> Sequence[Mapping[str, Any]]:
        return [json.loads(document) for document in self.kept.values()]


def begun(drawer: Drawer | None = None, **changes: object) -> tuple[Laboratory, Split]:
    laboratory = Laboratory(drawer or Drawer())
    split = laboratory.start({**ASKED, **changes}, BASE, NAMES, {}, 100.0)
    assert split is not None
    return laboratory, split


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"name": "a b"}, "name"),
        ({"weights": {"bf16": 50, "int9": 50}}, "weights.int9"),
        ({"weights": {"bf16": 50, "int8": 40}}, "weights"),
        ({"weights": {"bf16": 100}}, "weights"),
        ({"weights": {"bf16": "50", "int8": 50}}, "weights.bf16"),
        ({"baseline": "int8"}, "baseline"),
        ({"holdout": 100}, "holdout"),
        ({"ends_at_s": 50}, "ends_at_s"),
        ({"ends_at_s": 500, "duration_s": 5}, "duration_s"),
        ({"price_per_hour": -1}, "price_per_hour"),
        ({"colour": 1}, "colour"),
        ({"salt": 7}, "salt"),
    ],
)
def test_a_plan_that_is_wrong_names_the_key(changes: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_for({**ASKED, **changes}, "bf16", NAMES, 100.0)
    assert refused.value.path == path


def test_what_is_left_out_is_filled_in() -> None:
    plan = plan_for({"name": "e", "weights": {"int8": 60, "nf4": 40}, "duration_s": 60}, "bf16", NAMES, 100.0)
    assert (plan.salt, plan.baseline, plan.starts_at_s, plan.ends_at_s) == ("e", "int8", 100.0, 160.0)
    assert plan.arms == ("int8", "nf4")


def test_it_deals_by_its_own_table_and_gives_back_what_was_before() -> None:
    laboratory, split = begun()
    assert (dict(split.weights), split.salt, split.holdout) == ({"bf16": 50.0, "int8": 0.0, "nf4": 50.0}, "e", 10.0)
    assert split.revision == BASE.revision + 1
    assert split.shadow_rates == BASE.shadow_rates
    back = laboratory.stop("e", split, 200.0)
    assert back is not None
    assert {**back.to_dict(), "revision": 7} == BASE.to_dict()
    assert back.revision == split.revision + 1
    assert laboratory.stop("e", back, 201.0) is None
    assert laboratory.list()["active"] is None


def test_a_user_keeps_the_variant_at_every_ingress_and_after_every_restart() -> None:
    drawer = Drawer()
    _, split = begun(drawer)
    again = Laboratory(drawer).split
    assert again == split
    assert again is not None
    for user in map(str, range(500)):
        assert assign(again, user, "a") == assign(split, user, "b")
    other = begun(salt="another")[1]
    moved = sum(assign(other, user, "").variant != assign(split, user, "").variant for user in map(str, range(500)))
    assert 150 < moved < 350


def test_only_one_runs_at_a_time_and_a_name_is_used_once() -> None:
    laboratory, split = begun()
    with pytest.raises(Conflict, match="'e' is running; stop it first"):
        laboratory.start({**ASKED, "name": "f"}, split, NAMES, {}, 101.0)
    laboratory.stop("e", split, 102.0)
    with pytest.raises(Conflict, match="another name"):
        laboratory.start(ASKED, split, NAMES, {}, 103.0)
    with pytest.raises(NotFound, match="known: e"):
        laboratory.report("f", {}, 103.0)


def test_it_begins_and_ends_by_the_clock() -> None:
    laboratory = Laboratory(Drawer())
    assert laboratory.start({**ASKED, "starts_at_s": 200, "ends_at_s": 300}, BASE, NAMES, {}, 100.0) is None
    assert laboratory.active is not None
    assert laboratory.tick(BASE, {}, 199.0) is None
    split = laboratory.tick(BASE, {}, 200.0)
    assert split is not None
    assert split.weights["nf4"] == 50.0
    assert laboratory.tick(split, {}, 299.0) is None
    back = laboratory.tick(split, {}, 300.0)
    assert back is not None
    assert back.weights == BASE.weights
    shown = laboratory.report("e", {}, 400.0)
    assert (shown["experiment"]["state"], shown["experiment"]["stopped_by"]) == ("ended", "time")
    assert shown["elapsed_s"] == 100.0


def test_a_controller_that_dies_takes_neither_the_split_nor_the_evidence_with_it() -> None:
    drawer = Drawer()
    laboratory, split = begun(drawer)
    for parcel in parcels(split, random.Random(1), seconds=60, start_s=100.0):
        laboratory.take(parcel)
        laboratory.tick(split, {}, parcel.sent_at_s)
    before = laboratory.report("e", {}, 160.0)
    successor = Laboratory(drawer)
    assert successor.split == split
    after = successor.report("e", {}, 160.0)
    seen = [sum(row["n"] for row in shown["variants"]) for shown in (before, after)]
    assert seen[0] - 100 <= seen[1] <= seen[0]
    assert seen[1] > 400


def test_the_last_requests_still_count_and_then_the_report_is_kept_as_it_was() -> None:
    drawer = Drawer()
    laboratory, split = begun(drawer)
    feed = list(parcels(split, random.Random(1), seconds=30, start_s=100.0))
    for parcel in feed[:-1]:
        laboratory.take(parcel)
    back = laboratory.stop("e", split, 129.0)
    assert back is not None
    laboratory.take(feed[-1])
    facts = {"nf4": Facts("nf4", 1, {"weights": 5})}
    told = laboratory.report("e", facts, 131.0)
    assert sum(row["n"] for row in told["variants"]) + told["left_out"]["held_out"] == 300
    laboratory.tick(back, facts, 129.0 + 121.0)
    for kept in (laboratory, Laboratory(drawer)):
        later = kept.report("e", {}, 9999.0)
        assert later == json.loads(json.dumps(told))
    assert len(drawer.kept["e"]) < 200_000


def test_a_database_keeps_experiments_in_their_order(tmp_path: Path) -> None:
    shelf = DatabaseShelf(f"sqlite:///{tmp_path / 'state.db'}")
    laboratory, split = Laboratory(shelf), BASE
    for name in ("z", "a"):
        split = laboratory.start({**ASKED, "name": name}, split, NAMES, {}, 100.0) or split
        split = laboratory.stop(name, split, 200.0) or split
    shelf.close()
    again = Laboratory(DatabaseShelf(f"sqlite:///{tmp_path / 'state.db'}"))
    assert [row["name"] for row in again.list()["experiments"]] == ["a", "z"]
    assert again.list() == laboratory.list()
