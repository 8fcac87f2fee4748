"""Percentiles are the samples' own, and an interval covers as often as it says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.compare import Estimate, ratio_interval
from loadtest.statistics import Samples, describe, intervals, wilson


def one_each(values):
    return Samples.of([(value,) for value in values])


@given(st.lists(st.floats(1e-5, 3600), min_size=1, max_size=300))
def test_a_percentile_is_a_sample_by_nearest_rank(values):
    described = describe(one_each(values))
    ordered = sorted(values)
    for name, share in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}.items():
        true = ordered[math.ceil(share * len(values) - 1e-9) - 1]
        assert described[name] == pytest.approx(true, rel=0.0011, abs=1.1e-6)
    assert described["max"] == ordered[-1]
    assert described["mean"] == pytest.approx(sum(values) / len(values))


def test_nothing_measured_is_none_and_not_zero():
    described = describe(Samples.of([]))
    assert described["count"] == 0
    assert described["p50"] is described["mean"] is described["max"] is None


def test_few_samples_have_no_interval_and_rare_percentiles_need_many():
    assert set(intervals(one_each(range(5))).values()) == {None}
    found = intervals(one_each(np.linspace(0.1, 0.2, 300)))
    assert found["p90"] is not None
    assert found["p99"] is None, "three samples lie beyond it"


def test_the_interval_of_independent_samples_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = {"mean": 0, "p50": 0, "p90": 0}
    truth = {"mean": 1.0, "p50": math.log(2), "p90": math.log(10)}
    for number in range(80):
        found = intervals(one_each(rng.exponential(1.0, 200)), seed=number)
        for name in inside:
            low, high = found[name]
            inside[name] += low <= truth[name] <= high
    assert all(count >= 67 for count in inside.values()), inside  # 95 % of 80 is 76


def test_requests_that_queue_behind_one_another_get_wider_intervals():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 2000)
    waits = np.empty(2000)
    waits[0] = 0
    for number in range(1, 2000):
        waits[number] = 0.9 * waits[number - 1] + noise[number]
    queued = intervals(one_each(waits + 100))["mean"]
    shuffled = intervals(one_each(rng.permutation(waits + 100)))["mean"]
    assert queued[1] - queued[0] > 1.8 * (shuffled[1] - shuffled[0])


def test_gaps_of_one_answer_are_drawn_together():
    rng = np.random.default_rng(0)
    speeds = rng.uniform(0.01, 0.05, 60)
    together = Samples.of([[speed] * 50 for speed in speeds])
    alone = one_each(np.repeat(speeds, 50)[rng.permutation(3000)])
    wide, narrow = intervals(together)["mean"], intervals(alone)["mean"]
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_a_share_of_one_is_not_certain():
    low, high = wilson(50, 50)
    assert 0.9 < low < 0.95
    assert high == pytest.approx(1.0)
    assert wilson(0, 0) is None


def test_the_interval_of_a_ratio_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = 0
    for number in range(60):
        sides = []
        for mean in (1.0, 1.2):
            values = rng.exponential(mean, 200)
            sides.append(Estimate(float(values.mean()), intervals(one_each(values), seed=number)["mean"]))
        low, high = ratio_interval(*sides)
        inside += low <= 0.2 <= high
    assert inside >= 50, inside
