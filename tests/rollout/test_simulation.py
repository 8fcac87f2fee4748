"""Does the judge keep its promises where requests are not independent? Rollouts by the hundred, on fixed seeds.

`python -m tests.rollout.measure` plays more of them, and prints the table of docs/ROLLOUTS.md.
"""

from __future__ import annotations

import pytest

from serve.rollout import Evidence, Rules, StepSeen, judge
from tests.rollout.lockstep import play
from tests.rollout.measure import CASES, default_plan
from tests.rollout.replay import outcomes, parcels
from tests.rollout.simulation import Effect, World, simulate


@pytest.mark.parametrize("world", [World(users=300), World().plain()], ids=["dependent", "plain"])
def test_lockstep_is_the_real_judge(world: World) -> None:
    steps = ((0, 20.0), (500, 50.0))
    plan, effect = default_plan(world), Effect(failures=3.0, latency=1.1)
    fates = play(plan, world, effect, rollouts=2, requests=1500, steps=steps, seed=5, to_the_end=True)
    arrivals = list(simulate(world, effect, rollouts=2, requests=1500, steps=steps, seed=5))
    for rollout in range(2):
        records = outcomes(arrivals, rollout=rollout, sticky=world.zipf > 0)
        changed = max(record.assigned_at_s for record in records if record.revision == 1)
        evidence = Evidence(Rules("bf16", "int8"))
        evidence.steps = [StepSeen(0, 20.0, 1, 0.0), StepSeen(1, 50.0, 2, changed)]
        for parcel in parcels(records):
            assert evidence.take(parcel)
        verdict = judge(plan, evidence)
        assert verdict.log_e_value == pytest.approx(fates.log_e[rollout], abs=1e-4)
        for index, finding in enumerate(verdict.findings):
            for real, fast in ((finding.log_e_harm, fates.harm), (finding.log_e_safe, fates.safe)):
                assert max(real, -5.0) == pytest.approx(max(fast[index, rollout], -5.0), abs=1e-4), finding


def test_a_thousand_looks_at_two_equal_servers_roll_back_few() -> None:
    fates = play(
        default_plan(World()), World(), Effect(), rollouts=60, requests=2000, steps=((0, 50.0),), seed=2
    )  # fmt: skip
    assert fates.failed() <= 0.05


def test_a_canary_half_as_slow_again_is_found_soon() -> None:
    world = World()
    fates = play(
        default_plan(world), world, Effect(latency=1.5), rollouts=20, requests=6000, steps=((0, 50.0),), seed=3
    )  # fmt: skip
    assert fates.failed(3000) >= 0.9
    assert set(fates.guard) - {""} <= {"ttft", "itl", "e2e", "e2e_own_load"}


@pytest.mark.slow
def test_with_no_difference_false_rollback_stays_below_alpha() -> None:
    """Looking after each of 20,000 outcomes, all guards together."""
    fates = CASES["same"].play(200)
    assert fates.failed() <= 0.05
    assert fates.promoted >= 0.9


@pytest.mark.slow
def test_a_doubled_error_rate_is_rolled_back_within_6000_requests_per_arm() -> None:
    assert CASES["errors"].play(250).failed(6000) >= 0.9


@pytest.mark.slow
def test_twenty_percent_more_latency_is_rolled_back_within_3000_requests_per_arm() -> None:
    assert CASES["latency"].play(150).failed(3000) >= 0.9


@pytest.mark.slow
def test_a_canary_two_percent_slower_inside_a_margin_of_ten_is_promoted() -> None:
    fates = CASES["small-ramp"].play(200)
    assert fates.promoted >= 0.9


@pytest.mark.slow
def test_drift_is_rolled_back_though_the_latency_is_better() -> None:
    fates = CASES["drift"].play(60)
    assert fates.failed() >= 0.95
    assert set(fates.guard) <= {"", "kl_divergence"}
