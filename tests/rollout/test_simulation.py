"""Does the judge keep its promises where requests are not independent? Thousands of rollouts on fixed seeds."""

from __future__ import annotations

import pytest

from serve.rollout import Evidence, Expected, Plan, Rules, StepSeen, judge, plan_for
from tests.rollout.lockstep import play
from tests.rollout.replay import outcomes, parcels
from tests.rollout.simulation import Effect, World, simulate

HALF = ((0, 50.0),)
RAMP = ((0, 5.0), (2000, 10.0), (4000, 25.0), (8000, 50.0))


def plan(world: World) -> Plan:
    """The default plan, less what the simulation does not produce."""
    expected = Expected(kl_divergence=world.kl_nats, top1_agreement=world.top1)
    return plan_for("bf16", "int8", "int8", expected, {"guards": {"degenerate": None}})


@pytest.mark.parametrize("world", [World(users=300), World().plain()], ids=["dependent", "plain"])
def test_lockstep_is_the_real_judge(world: World) -> None:
    steps = ((0, 20.0), (900, 50.0))
    rules, effect = plan(world), Effect(failures=3.0, latency=1.1)
    fates = play(rules, world, effect, rollouts=3, requests=2500, steps=steps, seed=5, to_the_end=True)
    for rollout in range(3):
        arrivals = list(simulate(world, effect, rollouts=3, requests=2500, steps=steps, seed=5))
        records = outcomes(arrivals, rollout=rollout, sticky=world.zipf > 0)
        changed = max(record.assigned_at_s for record in records if record.revision == 1)
        evidence = Evidence(Rules("bf16", "int8"))
        evidence.steps = [StepSeen(0, 20.0, 1, 0.0), StepSeen(1, 50.0, 2, changed)]
        for parcel in parcels(records):
            assert evidence.take(parcel)
        verdict = judge(rules, evidence)
        assert verdict.log_e_value == pytest.approx(fates.log_e[rollout], abs=1e-4)
        for index, finding in enumerate(verdict.findings):
            for real, fast in ((finding.log_e_harm, fates.harm), (finding.log_e_safe, fates.safe)):
                assert max(real, -5.0) == pytest.approx(max(fast[index, rollout], -5.0), abs=1e-4), finding
