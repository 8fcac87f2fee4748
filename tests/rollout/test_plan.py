from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import ConfigError
from serve.rollout import Expected, Plan, Shadow, Step, kl_guard_nats, plan_for
from serve.rollout.estimate import Traffic, estimate
from serve.rollout.measures import MEASURES

BY_EXAMPLE = """
steps:
  - 5
  - {weight: 25, min_samples: 500, hold_s: 300}
  - {weight: 50, evidence: pass, gate: approval}
shadow: {rate: 0.2, min_samples: 100}
guards:
  ttft: 0.15                          # a number alone is the margin
  kl_divergence: {cap: 0.06}
  output_length: null                 # not watched
hard: {crashes: 3}
alpha: 0.01
on_inconclusive: rollback
free_stable: true
"""


def test_a_plan_in_yaml_changes_the_defaults_and_nothing_else() -> None:
    plan = plan_for("bf16", "int8", "int8", Expected(kl_divergence=0.01), yaml.safe_load(BY_EXAMPLE))
    assert plan.steps[1] == Step(25.0, 500, 300)
    assert [step.weight for step in plan.steps] == [5.0, 25.0, 50.0]
    assert plan.shadow == Shadow(0.2, 100)
    assert plan.guards["ttft"].margin == 0.15
    assert plan.guards["kl_divergence"].limits(MEASURES["kl_divergence"]) == (0.017, 0.017)
    assert "output_length" not in plan.guards
    assert "error_rate" in plan.guards
    assert (plan.hard.crashes, plan.hard.nonfinite_tokens, plan.alpha) == (3, 1, 0.01)


@given(st.sampled_from(["bf16", "int8", "gptq4-g64", "wanda50+gptq4-g64", "nf4", "magnitude50", "fp8"]))
def test_a_plan_survives_json(precision: str) -> None:
    plan = plan_for("bf16", "other", precision)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_defaults_expect_less_of_a_smaller_precision() -> None:
    limits = [
        plan_for("bf16", "x", name).guards["kl_divergence"].limits(MEASURES["kl_divergence"])[0]
        for name in ("fp16", "int8", "nf4", "wanda50")
    ]
    assert limits == sorted(limits)
    assert (
        plan_for("bf16", "x", "wanda50+gptq4").guards["kl_divergence"]
        == plan_for("bf16", "x", "gptq4").guards["kl_divergence"]
    )


def test_the_variants_own_evaluation_comes_before_the_typical() -> None:
    known = plan_for("bf16", "x", "nf4", Expected(kl_divergence=0.01, top1_agreement=0.95, flips=0.1))
    assert known.guards["kl_divergence"].expected == 0.01
    low, _ = known.guards["top1_agreement"].limits(MEASURES["top1_agreement"])
    assert -low == pytest.approx(0.95 - 0.0325)
    assert "flips" in known.guards
    assert "flips" not in plan_for("bf16", "x", "nf4").guards


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("rollout.stepps: unknown key; allowed: stable", {"stepps": []}),
        ("rollout.steps: must be a list", {"steps": 5}),
        ("rollout.steps: is empty", {"steps": []}),
        ("rollout.steps[0].weigth: unknown key", {"steps": [{"weigth": 5}]}),
        ("rollout.steps[0].weight: is missing", {"steps": [{}]}),
        ("rollout.steps[0].weight: must be a number from 0.001 to 99", {"steps": [100]}),
        ("rollout.steps[1].weight: must rise", {"steps": [10, 10]}),
        ("rollout.steps[0].gate", {"steps": [{"weight": 5, "gate": "maybe"}]}),
        ("rollout.steps[0].min_samples", {"steps": [{"weight": 5, "min_samples": "many"}]}),
        ("rollout.guards.speed: unknown guard; allowed: error_rate", {"guards": {"speed": 0.1}}),
        ("rollout.guards.ttft.margn: unknown key", {"guards": {"ttft": {"margn": 1}}}),
        ("rollout.guards.ttft.cap: is only for quality", {"guards": {"ttft": {"cap": 1}}}),
        ("rollout.guards.error_rate.tolerance: is only for lat", {"guards": {"error_rate": {"tolerance": 0.001}}}),
        ("rollout.guards.ttft.tolerance: must be a number from 0 to 0.1", {"guards": {"ttft": {"tolerance": 0.2}}}),
        ("rollout.shadow.rate", {"shadow": {"rate": 2}}),
        ("rollout.hard.crashes", {"hard": {"crashes": 0}}),
        ("rollout.alpha", {"alpha": 0}),
        ("rollout.on_inconclusive", {"on_inconclusive": "panic"}),
        ("rollout.canary: 'bf16' is already", {"canary": "bf16"}),
        ("rollout.guards: must be a mapping", {"guards": 3}),
    ],
)
def test_a_wrong_plan_is_refused_by_the_path_of_its_key(path: str, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_for("bf16", "int8", "int8", None, changes)
    assert path in str(refused.value)


def test_a_dry_run_says_what_will_be_needed_and_which_guard_takes_longest() -> None:
    told = estimate(plan_for("bf16", "int8", "int8"), Traffic(requests_per_s=5.0))
    assert 1000 < told.canary_requests < 30_000
    assert told.total_requests > told.canary_requests
    assert told.seconds == pytest.approx(told.total_requests / 5.0, rel=0.01)
    assert max(told.needs, key=lambda need: need.pass_requests).guard in told.sentence


@settings(max_examples=25, deadline=None)
@given(st.floats(0.02, 0.5), st.floats(1.1, 5.0))
def test_a_wider_margin_needs_fewer_requests_and_a_larger_scatter_more(margin: float, factor: float) -> None:
    def needed(size: float, deviation: float) -> int:
        plan = plan_for("bf16", "int8", "int8", None, {"guards": {"ttft": {"margin": size}}})
        needs = estimate(plan, Traffic(deviations={"ttft": deviation})).needs
        return next(need.pass_requests for need in needs if need.guard == "ttft")

    assert needed(margin * factor, 0.5) <= needed(margin, 0.5) <= needed(margin, 0.5 * factor)


def test_the_guard_that_is_shown_is_the_one_that_a_rollout_judges_by() -> None:
    for precision in ("bf16", "int8", "nf4", "something"):
        guard = plan_for("bf16", "canary", precision).guards["kl_divergence"]
        assert guard.limits(MEASURES["kl_divergence"])[1] == kl_guard_nats(precision)
