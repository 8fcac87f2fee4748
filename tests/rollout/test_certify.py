from __future__ import annotations

import pytest

from serve.rollout import plan_for
from serve.rollout.certify import EFFECTS, certify
from tests.rollout.replay import outcomes
from tests.rollout.simulation import Effect, World, simulate

PLAN = plan_for(
    "bf16", "int8", "int8", None,
    {"guards": {"degenerate": None, "kl_divergence": None, "top1_agreement": None}, "block_s": 10.0},
)  # fmt: skip


@pytest.fixture(scope="module")
def recorded() -> list:  # type: ignore[type-arg]
    arrivals = simulate(World(users=400), Effect(), rollouts=1, requests=3000, steps=((0, 0.0),), seed=4)
    return outcomes(arrivals)


def test_recorded_traffic_dealt_to_equal_arms_is_not_rolled_back(recorded: list) -> None:  # type: ignore[type-arg]
    seen: list[tuple[int, int]] = []
    told = certify(
        PLAN, recorded, replays=6, looks_every=200, effects=EFFECTS[:1], progress=lambda *at: seen.append(at)
    )
    assert (told.outcomes, told.false_rollback) == (3000, 0.0)
    assert "rolls back falsely in 0.0 %" in told.sentence
    assert seen[-1] == (6, 6)


def test_a_planted_effect_is_found_and_says_after_how_many_requests(recorded: list) -> None:  # type: ignore[type-arg]
    effects = [effect for effect in EFFECTS if effect.name == "5 % more errors"]
    told = certify(PLAN, recorded, replays=6, looks_every=100, effects=effects)
    assert told.power == {"5 % more errors": 1.0}
    assert told.rows[0].median_requests is not None
    assert 50 < told.rows[0].median_requests < 1500


def test_the_same_seed_gives_the_same_certificate(recorded: list) -> None:  # type: ignore[type-arg]
    effects = EFFECTS[2:3]
    one, other = (certify(PLAN, recorded[:800], replays=2, looks_every=200, effects=effects) for _ in range(2))
    assert one == other
