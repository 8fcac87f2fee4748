"""A search finds the highest rate that meets the SLO, and a sweep its knee."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.sweep import highest_meeting, knee, next_rate


@given(st.floats(0.05, 3000))
def test_the_search_ends_within_ten_percent_below_the_capacity(capacity):
    tried = []
    while (rate := next_rate(tried)) is not None:
        assert len(tried) < 30
        tried.append((rate, rate <= capacity))
    best = max(rate for rate, met in tried if met)
    assert best <= capacity <= best * 1.1 + 1e-9


def test_the_search_gives_up_where_nothing_is_good_enough():
    tried = []
    while (rate := next_rate(tried)) is not None:
        tried.append((rate, False))
    assert len(tried) < 10


def stage(rate, completed, e2e_s, good):
    group = {"requests_per_s": completed, "e2e_s": {"p50": e2e_s}, "goodput_ratio": good}
    return {"offered": {"loop": "open", "rate_per_s": rate}, "overall": group}


def test_the_knee_is_where_throughput_over_latency_is_greatest():
    stages = [stage(1, 1, 0.2, 1.0), stage(4, 4, 0.25, 1.0), stage(8, 6, 2.0, 0.3)]
    assert knee(stages) == 1
    assert knee(stages[:2]) is None, "two points have no bend"


def test_a_stage_that_passes_above_a_failure_is_luck():
    stages = [stage(1, 1, 0.2, 1.0), stage(4, 4, 0.2, 0.9), stage(8, 8, 0.2, 1.0)]
    assert highest_meeting(stages, 0.99) == 0
    assert highest_meeting(stages[1:2], 0.99) is None


def test_a_ramp_shows_where_it_bends(measure):
    # three slots of 0.1 s are 30 requests a second
    fake = {"run": "ramp", "ttft": 0.1, "tokens": 1, "slots": 3}
    load = ("--rate", "5..60", "--duration", 5, "--warmup", "0s", "--arrivals", "constant", "--slo", "e2e_s=400ms")
    result = measure(fake, *load).result
    rates = [stage["offered"]["rate_per_s"] for stage in result["stages"]]
    assert rates == pytest.approx([7.75 + 5.5 * number for number in range(10)])
    measured = [stage["overall"]["requests"]["measured"] for stage in result["stages"]]
    assert sum(measured) == result["overall"]["requests"]["measured"] == pytest.approx(5 * 32.5, abs=2)
    assert result["highest_meeting_slo"]["offered"]["rate_per_s"] < 55
    assert result["stages"][9]["overall"]["e2e_s"]["p50"] > result["stages"][1]["overall"]["e2e_s"]["p50"]


@pytest.mark.slow
def test_rate_auto_finds_what_a_server_with_four_slots_can_take(measure):
    # four slots of 0.1 s are 40 requests a second; at 64 the backlog costs more than a second within three
    fake = {"run": "auto", "ttft": 0.1, "tokens": 1, "slots": 4}
    load = ("--rate", "auto", "--duration", 3, "--arrivals", "constant", "--slo", "e2e_s=1s")
    outcome = measure(fake, *load, "--goodput-target", 0.8)
    assert outcome.exit_code == 0, outcome.stderr
    found = outcome.result["highest_meeting_slo"]
    assert 4 < found["offered"]["rate_per_s"] < 64
    assert found["goodput_ratio"] >= 0.8
    assert outcome.result["slo"]["met"] is True
