"""What an experiment counts, what it leaves out, and what it says of both."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from serve.experiment import Facts, Plan, Tally, report
from serve.experiment.busy import Busy
from serve.rollout import Batch, Drift, Outcome, Split
from tests.experiment.worlds import parcels

PLAN = Plan("e", {"bf16": 50.0, "int8": 50.0}, "bf16", "salt", 0.0, settle_s=0.0, block_s=5.0)
BASE = Split("bf16", {"bf16": 100.0, "int8": 0.0}, revision=3)


def counted(plan: Plan = PLAN, seed: int = 1, **how: object) -> Tally:
    split = plan.split(BASE)
    tally = Tally.begin(plan, split.revision, 0.0)
    for parcel in parcels(split, random.Random(seed), **{"seconds": 240, **how}):  # type: ignore[arg-type]
        tally.take(parcel)
    return tally


def told(tally: Tally, facts: dict[str, Facts] | None = None, at_s: float = 240.0) -> dict[str, object]:
    return json.loads(json.dumps(report(tally, facts or {}, at_s)))  # type: ignore[no-any-return]


def rows(shown: dict[str, object], name: str = "variants") -> dict[str, dict]:  # type: ignore[type-arg]
    return {row.get("measure", row.get("variant", row.get("arm"))): row for row in shown[name]}  # type: ignore


def test_a_parcel_that_comes_twice_counts_once_and_a_restart_changes_nothing() -> None:
    split = PLAN.split(BASE)
    once, again = Tally.begin(PLAN, split.revision, 0.0), Tally.begin(PLAN, split.revision, 0.0)
    for parcel in parcels(split, random.Random(3), seconds=20):
        assert once.take(parcel)
        again.take(parcel)
        assert not again.take(parcel)
        again = Tally.from_dict(json.loads(json.dumps(again.to_dict())))
    assert again.to_dict() == once.to_dict()
    assert told(again) == told(once)


def test_what_is_left_out_is_counted_by_reason() -> None:
    revision = PLAN.split(BASE).revision
    good = Outcome(1, "int8", "sticky", revision, 1.0, "0" * 16, 2.0, completion_tokens=3, e2e_s=1.0)
    records = [
        good,
        replace(good, record=2, route="pinned"),
        replace(good, record=3, held_out=True),
        replace(good, record=4, client_fault=True),
        replace(good, record=5, warm_up=True),
        replace(good, record=6, shadow=True),
        replace(good, record=7, revision=revision - 1),
        replace(good, record=8, variant="nf4"),
        replace(good, record=9, route="pinned", revision=revision - 1),
    ]
    tally = Tally.begin(PLAN, revision, 0.0)
    tally.take(Batch("i", 1, 2.0, tuple(records)))
    assert tally.left_out == {
        "pinned": 1, "held_out": 1, "client_fault": 1, "warm_up": 1, "shadow": 1, "earlier": 3,
    }  # fmt: skip
    assert {name: arm.n for name, arm in tally.arms.items()} == {"bf16": 0, "int8": 1}


def test_drift_that_follows_later_is_added_to_its_request() -> None:
    revision = PLAN.split(BASE).revision
    end = Outcome(1, "int8", "sticky", revision, 1.0, "0" * 16, 2.0)
    drift = Drift(10, 0.02, 0.5, 9, nll_variant_nats=11.0, nll_reference_nats=10.0, nll_ratio_tokens=10)
    tally = Tally.begin(PLAN, revision, 0.0)
    tally.take(Batch("i", 1, 2.0, (end,)))
    assert rows(told(tally))["int8"]["drift"] is None
    for sequence in (2, 3):
        tally.take(Batch("i", sequence, 3.0, (replace(end, drift=drift),)))
    seen = rows(told(tally))["int8"]["drift"]
    assert (seen["requests"], seen["tokens"]) == (1, 10)
    assert seen["kl_divergence_nats"]["estimate"] == pytest.approx(0.02)
    assert seen["top1_agreement"]["estimate"] == pytest.approx(0.9)
    assert seen["perplexity_ratio"]["estimate"] == pytest.approx(1.105, abs=0.001)


def test_an_answer_of_the_reference_that_another_arm_read_is_that_arms_drift() -> None:
    revision = PLAN.split(BASE).revision
    served = Outcome(1, "bf16", "sticky", revision, 1.0, "0" * 16, 2.0)
    drift = Drift(10, 0.02, 0.5, 9, nll_variant_nats=33.0, nll_reference_nats=30.0, nll_ratio_tokens=30)
    tally = Tally.begin(PLAN, revision, 0.0)
    tally.take(Batch("i", 1, 2.0, (served,)))
    for sequence in (2, 3):
        tally.take(Batch("i", sequence, 3.0, (replace(served, read_by="int8", reading=drift),)))
    shown = rows(told(tally))
    assert shown["bf16"]["drift"] is None
    assert (shown["int8"]["n"], shown["int8"]["drift"]["requests"]) == (0, 1)
    assert shown["int8"]["drift"]["perplexity_ratio"]["estimate"] == pytest.approx(1.105, abs=0.001)


def test_a_request_that_hangs_past_the_deadline_is_an_error() -> None:
    revision = PLAN.split(BASE).revision
    hanging = Outcome(1, "int8", "sticky", revision, 0.0, "0" * 16)
    tally = Tally.begin(PLAN, revision, 0.0)
    for sequence in range(1, 5):
        tally.take(Batch("i", sequence, 100.0 * sequence, (hanging,)))
    assert rows(told(tally))["int8"]["errors"] == 1
    tally.take(Batch("i", 9, 500.0, (replace(hanging, finished_at_s=490.0),)))
    assert (tally.arms["int8"].n, rows(told(tally))["int8"]["errors"]) == (1, 1)


def test_equal_variants_show_no_difference_and_the_split_agrees() -> None:
    shown = told(counted())
    split = shown["split"]
    assert split["matches"]  # type: ignore[index]
    assert split["unit"] == "users"  # type: ignore[index]
    assert sum(arm["units"] for arm in split["arms"]) == 300  # type: ignore[index]
    assert {row["result"] for row in shown["comparisons"]} == {"no difference shown"}  # type: ignore[union-attr]


def test_a_slower_variant_is_shown_with_a_sentence() -> None:
    shown = told(counted(slower=1.4))
    found = rows(shown, "comparisons")["itl"]
    assert found["result"] == "higher"
    assert found["change_ratio"]["low"] < 0.4 < found["change_ratio"]["high"]
    assert "ITL of int8 is" in found["sentence"]
    assert "higher than that of bf16 at equal load" in found["sentence"]
    assert rows(shown, "comparisons")["output_length"]["result"] == "no difference shown"


def test_a_variant_with_little_traffic_looks_fast_but_not_at_the_same_load() -> None:
    """int8 is 10 % slower at any given load; run at a third of the load it seems to be far faster."""
    weights = {"bf16": 70.0, "int8": 30.0}
    shown = told(counted(replace(PLAN, weights=weights), slower=1.1, load={"bf16": 8, "int8": 4}))
    seen, mixed = rows(shown), {name: row["at_common_mix"] for name, row in rows(shown).items()}
    assert seen["int8"]["itl_s"]["p50"]["high"] < seen["bf16"]["itl_s"]["p50"]["low"]
    assert 0.0 < mixed["int8"]["coverage_ratio"] < 1.0
    ratio = mixed["int8"]["itl_s"]["p50"]["estimate"] / mixed["bf16"]["itl_s"]["p50"]["estimate"]
    assert ratio == pytest.approx(1.1, abs=0.06)
    assert {row["running_sequences"] for row in shown["strata"]} >= {"2", "3", "4", "5-6", "7-8"}  # type: ignore[union-attr]
    assert {row["prompt_tokens"] for row in shown["strata"]} == {"1-32", "33-128"}  # type: ignore[union-attr]


def test_a_split_that_is_not_the_configured_one_is_called_out() -> None:
    split = PLAN.split(BASE)
    tally = Tally.begin(PLAN, split.revision, 0.0)
    wrong = replace(split, weights={"bf16": 70.0, "int8": 30.0})
    for parcel in parcels(wrong, random.Random(5), seconds=60, users=600):
        tally.take(parcel)
    shown = told(tally)["split"]
    assert not shown["matches"]  # type: ignore[index]
    assert "find out why" in shown["sentence"]  # type: ignore[index]


def test_held_out_users_stay_on_stable_and_belong_to_the_split_test() -> None:
    shown = told(counted(replace(PLAN, holdout=20.0), users=1000))
    assert shown["left_out"]["held_out"] > 300  # type: ignore[index]
    arms = rows(shown["split"], "arms")  # type: ignore[arg-type]
    assert arms["held out"]["configured_ratio"] == pytest.approx(0.2)
    assert arms["held out"]["realised_ratio"] == pytest.approx(0.2, abs=0.05)
    assert shown["split"]["matches"]  # type: ignore[index]


def test_tokens_cost_energy_and_memory_are_told_per_variant() -> None:
    tally = counted(replace(PLAN, price_per_hour=3.6))
    measured = Facts("int8", 2, {"weights": 7}, 0.5, energy_joules=50.0, generation_tokens=100.0)
    facts = {"int8": replace(measured, energy_measured="RAPL package-0", co2_grams_per_kwh=360.0)}
    row = rows(told(tally, facts))["int8"]
    assert row["tokens_per_s"] == pytest.approx(row["completion_tokens"] / 240)
    assert row["cost_per_million_tokens"] == pytest.approx(2 * 0.001 * 240 / row["completion_tokens"] * 1e6)
    assert row["cost_per_million_tokens_busy"] <= row["cost_per_million_tokens"]
    assert (row["memory_bytes"], row["memory_saved_ratio"], row["energy_joules_per_token"]) == (
        {"weights": 7},
        0.5,
        0.5,
    )
    assert row["energy_measured"] == "RAPL package-0"
    assert row["co2_grams_per_million_tokens"] == pytest.approx(50.0)
    unmeasured = Facts("int8", energy_measured="unavailable: no counters", co2_grams_per_kwh=360.0)
    row = rows(told(counted(), {"int8": unmeasured}))["int8"]
    assert row["cost_per_million_tokens"] is None
    assert row["energy_joules_per_token"] is row["co2_grams_per_million_tokens"] is None
    assert row["energy_measured"] == "unavailable: no counters"


def test_busy_time_is_the_length_of_the_union_in_whatever_order() -> None:
    rng = random.Random(4)
    spans = [(start := rng.uniform(0, 100), start + rng.uniform(0, 3)) for _ in range(200)]
    busy = Busy()
    for span in spans:
        busy.add(*span)
    ticks = sum(any(low <= tick / 100 < high for low, high in spans) for tick in range(10_500))
    assert busy.total_s == pytest.approx(ticks / 100, rel=0.01)
    assert Busy.from_dict(json.loads(json.dumps(busy.to_dict()))) == busy


def test_memory_is_bounded_however_long_it_runs() -> None:
    plan = replace(PLAN, block_s=1.0)
    tally = counted(plan, seconds=2000, per_s=2)
    assert tally.width_s == 32.0
    assert all(len(arm.errors.blocks) <= 64 for arm in tally.arms.values())
