from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ConfigError
from serve.rollout import Batch, Guard, Outcome, Plan, Rollout, Split, Step, assign, deal

PLAN = Plan("bf16", "int8", (Step(10.0, 5, 10.0), Step(50.0, 5, 10.0)), guards={"error_rate": Guard(0.05)}, block_s=1.0)
BASE = Split("bf16", {"bf16": 100.0}, salt="s", revision=7)


@given(
    st.lists(st.integers(0, 50), min_size=2, max_size=2),
    st.integers(0, 100),
    st.booleans(),
    st.floats(0, 1),
    st.integers(0, 50),
)
def test_whatever_is_dealt_sums_to_100_and_gives_the_canary_what_was_asked(
    others: list[int], weight: int, promoted: bool, shadow: float, before: int
) -> None:
    weights = {"bf16": 100 - sum(others) if not before else max(0, 100 - sum(others) - before)}
    rest = 100 - weights["bf16"] - sum(others)
    base = Split("bf16", {**weights, "nf4": others[0], "gptq4": others[1], "int8": rest})
    split = deal(base, PLAN, float(weight), promoted=promoted, shadow_rate=shadow)
    assert sum(split.weights.values()) == pytest.approx(100.0)
    if promoted:
        assert (split.stable, split.weights["bf16"]) == ("int8", 0.0)
        assert split.weights["int8"] == pytest.approx(100.0 - sum(others))
    else:
        assert split.weights["int8"] == weight
        assert split.stable == "bf16"
    assert split.shadow_rates.get("int8", 0.0) == shadow


def played(failing: bool, seconds: int = 200) -> tuple[Rollout, list[Split]]:
    rollout, _ = Rollout.begin("r1", PLAN, BASE, 0.0)
    splits = []
    for second in range(seconds):
        now_s = float(second)
        records = []
        for record in range(1 + 20 * second, 21 + 20 * second):
            variant = assign(rollout.split, f"user-{record % 400}", "").variant
            error = "internal" if failing and variant == "int8" else None
            records.append(
                Outcome(record, variant, "sticky", rollout.split.revision, now_s, f"{record % 400:016x}", now_s, error)
            )
        rollout.take(Batch("a", second + 1, now_s, tuple(records)))
        rollout.tick(now_s)
        splits.append(rollout.split)
    return rollout, splits


def test_a_good_canary_becomes_stable_and_takes_all() -> None:
    rollout, splits = played(failing=False)
    assert rollout.state.phase == "succeeded"
    assert (rollout.split.stable, rollout.split.weights) == ("int8", {"bf16": 0.0, "int8": 100.0})
    assert [split.weights.get("int8", 0.0) for split in dict.fromkeys(splits)] == [10.0, 50.0, 100.0]
    revisions = [split.revision for split in splits]
    assert revisions == sorted(revisions)
    assert revisions[0] > BASE.revision


def test_a_bad_canary_gives_back_all_that_it_had() -> None:
    rollout, _ = played(failing=True)
    assert rollout.state.phase == "rolled_back"
    assert rollout.split.weights == {"bf16": 100.0, "int8": 0.0}
    assert rollout.split.canary is None


def test_users_only_move_into_the_canary_while_it_grows() -> None:
    _, splits = played(failing=False)
    for user in (f"user-{number}" for number in range(400)):
        path = [assign(split, user, "").variant for split in splits]
        assert path == sorted(path)  # bf16 ... then int8 ..., never back


def test_a_new_target_ends_the_rollout_and_begins_where_it_stood() -> None:
    rollout, _ = played(failing=False, seconds=5)
    entries, _ = rollout.supersede("nf4", 5.0, "ada")
    assert rollout.state.phase == "aborted"
    assert "ada for a rollout to nf4" in entries[-1].sentence
    again, _ = Rollout.begin("r2", Plan("bf16", "nf4", guards=PLAN.guards), rollout.split, 6.0)
    again.tick(6.0)
    assert again.split.revision > rollout.split.revision
    assert again.split.weights == {"bf16": 95.0, "int8": 0.0, "nf4": 5.0}


def test_a_step_that_deals_as_before_has_a_revision_of_its_own() -> None:
    base = Split("bf16", {"bf16": 90.0, "int8": 10.0}, revision=3)
    rollout, _ = Rollout.begin("r1", PLAN, base, 0.0)
    rollout.tick(0.0)
    assert rollout.split.revision == 4
    assert [step.revision for step in rollout.evidence.steps] == [4]
    rollout.take(Batch("a", 1, 1.0, (Outcome(1, "int8", "canary", 3, 0.5, finished_at_s=0.9),)))
    assert rollout.evidence.n() == (0, 0)


def test_a_plan_for_another_stable_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="'bf16' is not the stable variant"):
        Rollout.begin("r1", PLAN, Split("int8", {"int8": 100.0}), 0.0)


def test_a_rollout_survives_json_at_any_moment() -> None:
    for seconds in (1, 30, 120):
        rollout, _ = played(failing=True, seconds=seconds)
        again = Rollout.from_dict(json.loads(json.dumps(rollout.to_dict())))
        assert json.dumps(again.to_dict()) == json.dumps(rollout.to_dict())
