from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.rollout import Batch, Drift, Evidence, Outcome, Rules, StepSeen

RULES = Rules("bf16", "int8", deadline_s=60.0, settle_s=10.0)


def evidence(*steps: StepSeen) -> Evidence:
    seen = Evidence(RULES)
    for step in steps or (StepSeen(0, 50.0, 1, 0.0),):
        seen.begin_step(step)
    return seen


def outcome(record: int = 1, variant: str = "int8", at_s: float = 20.0, **options: object) -> Outcome:
    base = Outcome(
        record, variant, "canary", 1, at_s, f"{record % 50:016x}", at_s + 1.0,
        completion_tokens=20, ttft_s=0.1, itl_mean_s=0.02, e2e_s=0.5,
    )  # fmt: skip
    return replace(base, **options)  # type: ignore[arg-type]


def opened(record: int, at_s: float = 20.0, variant: str = "int8") -> Outcome:
    return Outcome(record, variant, "canary", 1, at_s, f"{record:016x}")


def parcel(sequence: int, *outcomes: Outcome, sent_at_s: float = 30.0, ingress: str = "a") -> Batch:
    return Batch(ingress, sequence, sent_at_s, outcomes)


def failures(seen: Evidence) -> float:
    return sum(row[0] for row in seen.tables.get("error_rate", {}).values())


@pytest.mark.parametrize(
    "what",
    [
        {"route": "pinned"},
        {"held_out": True},
        {"client_fault": True, "error": "bad_request"},
        {"variant": "nf4"},
        {"revision": 0},
        {"warm_up": True},
    ],
)
def test_what_does_not_count_by_rule(what: dict[str, object]) -> None:
    seen = evidence()
    seen.take(parcel(1, outcome(**what)))  # type: ignore[arg-type]
    assert seen.n() == (0, 0)
    assert all(sums.n_canary == sums.n_stable == 0 for sums in seen.sums.values())


def test_a_request_belongs_to_the_step_that_dealt_it_even_if_it_ends_later() -> None:
    seen = evidence(StepSeen(0, 10.0, 1, 0.0), StepSeen(1, 50.0, 2, 100.0))
    seen.take(parcel(1, outcome(1, at_s=99.0, finished_at_s=140.0), outcome(2, at_s=120.0, revision=2)))
    assert (seen.n(0), seen.n(1)) == ((1, 0), (1, 0))


def test_latency_is_not_compared_before_a_step_has_settled_but_failures_count() -> None:
    seen = evidence()
    seen.take(parcel(1, outcome(1, at_s=5.0), outcome(2, at_s=15.0), outcome(3, at_s=5.0, error="internal")))
    assert seen.sums["ttft"].n_canary == 1
    assert seen.sums["output_length"].n_canary == 2
    assert failures(seen) == 1.0


def test_a_hanging_request_is_a_failure_at_its_deadline_and_stays_one() -> None:
    seen = evidence()
    seen.take(parcel(1, opened(1), sent_at_s=21.0))
    seen.take(parcel(2, sent_at_s=79.0))
    assert failures(seen) == 0.0
    seen.take(parcel(3, sent_at_s=81.0))
    seen.take(parcel(4, sent_at_s=82.0))
    assert failures(seen) == 1.0
    seen.take(parcel(5, replace(opened(1), finished_at_s=90.0), sent_at_s=91.0))
    assert (failures(seen), seen.n()) == (1.0, (1, 0))


def test_a_clock_that_jumps_makes_no_failures() -> None:
    seen = evidence()
    seen.take(parcel(1, opened(1), sent_at_s=21.0))
    seen.take(parcel(2, sent_at_s=4000.0))
    seen.take(parcel(3, outcome(1), sent_at_s=4001.0))
    assert failures(seen) == 0.0


def test_a_silent_ingress_says_nothing_about_the_variant() -> None:
    seen = evidence()
    seen.take(parcel(1, opened(1), sent_at_s=21.0))
    for sequence in range(1, 9):
        seen.take(parcel(sequence, sent_at_s=1000.0 + sequence, ingress="b"))
    assert failures(seen) == 0.0


def test_a_burst_of_failures_is_one_event() -> None:
    seen = evidence()
    hang = [outcome(n, at_s=20.0 + n / 100, error="internal") for n in range(1, 100)]
    seen.take(parcel(1, *hang))
    assert failures(seen) < 5.0
    assert seen.n() == (99, 0)


def test_drift_that_comes_after_its_answer_counts_once() -> None:
    seen = evidence()
    drift = Drift(10, 0.01, 0.1, 9)
    seen.take(parcel(1, outcome(1)))
    seen.take(parcel(2, outcome(1, drift=drift)))
    seen.take(parcel(3, outcome(1, drift=drift)))
    assert seen.sums["kl_divergence"].n_canary == 1
    assert seen.n() == (1, 0)


def test_what_stable_served_and_the_canary_read_is_the_canarys_quality() -> None:
    """Its perplexity ratio is then taken over the answer too, which a variant's own text would flatter."""
    seen = evidence()
    own = Drift(10, 0.01, 0.1, 9, nll_variant_nats=8.0, nll_reference_nats=8.0, nll_ratio_tokens=4)
    read = Drift(20, 0.03, 0.2, 18, nll_variant_nats=33.0, nll_reference_nats=30.0, nll_ratio_tokens=30)
    served = outcome(2, "bf16", read_by="int8", reading=read)
    seen.take(parcel(1, outcome(1, drift=own), outcome(2, "bf16")))
    seen.take(parcel(2, served))
    seen.take(parcel(3, served))
    assert seen.sums["kl_divergence"].estimate == pytest.approx(0.02)
    assert seen.sums["perplexity_ratio"].estimate == pytest.approx((0.0 + 0.1) / 2)
    assert seen.sums["perplexity_ratio"].n_canary == 2
    assert seen.n() == (1, 1)


def test_what_is_said_of_another_variant_is_nothing_about_the_canary() -> None:
    seen = evidence()
    drift = Drift(10, 0.01, 0.1, 9, nonfinite_tokens=3, nll_ratio_tokens=4)
    seen.take(
        parcel(
            1,
            outcome(1, "bf16", read_by="nf4", reading=drift),
            outcome(2, "bf16", drift=drift),  # stable's own, where the reference is a third variant
            outcome(3, "int8", read_by="bf16", reading=drift),  # the canary is the reference
        )
    )
    assert seen.sums["kl_divergence"].n_canary == 0
    assert seen.nonfinite_tokens == 0


def test_without_a_fair_token_there_is_no_perplexity_ratio() -> None:
    seen = evidence()
    seen.take(parcel(1, outcome(1, drift=Drift(10, 0.01, 0.1, 9, nll_variant_nats=3.0, nll_reference_nats=9.0))))
    assert seen.sums["kl_divergence"].n_canary == 1
    assert seen.sums["perplexity_ratio"].n_canary == 0


def test_numbers_that_are_not_finite_stop_the_canary_also_where_it_only_reads() -> None:
    seen = evidence()
    bad = Drift(10, 0.0, 0.0, 10, nonfinite_tokens=2)
    seen.take(parcel(1, outcome(1, "bf16", read_by="int8", reading=bad)))
    assert seen.nonfinite_tokens == 2


def test_hard_failures_are_counted_by_the_second_and_nan_by_the_token() -> None:
    seen = evidence()
    died = [outcome(n, at_s=20.0 + n / 100, error="replica_died") for n in range(1, 17)]
    bad = outcome(50, drift=Drift(10, 0.0, 0.0, 10, nonfinite_tokens=2))
    seen.take(parcel(1, *died, bad))
    assert seen.hard == {"replica_died": 1}
    assert seen.nonfinite_tokens == 2


def test_a_hundred_failures_without_a_success_are_seen_as_such() -> None:
    seen = evidence()
    seen.take(parcel(1, *(outcome(n, error="internal") for n in range(1, 30))))
    assert seen.failures_in_a_row == 29
    seen.take(parcel(2, outcome(40)))
    assert seen.failures_in_a_row == 0


def test_a_mirrored_request_is_compared_with_the_one_it_mirrors() -> None:
    seen = evidence(StepSeen(-1, 0.0, 1, 0.0))
    for record in range(1, 200, 2):
        served = outcome(record, "bf16", at_s=20.0 + record, ttft_s=0.1 * record)
        mirror = outcome(record + 1, at_s=20.0 + record, ttft_s=0.12 * record, shadow=True, pair=record)
        seen.take(parcel(record, served, mirror) if record % 4 == 1 else parcel(record, mirror, served))
    pairs = seen.paired["ttft"]
    assert pairs.n_canary == 100
    assert pairs.estimate == pytest.approx(0.1823, abs=1e-3)
    assert seen.assigned == {"-1": [0, 25]}  # units, not requests


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 39), min_size=1, max_size=120),
    st.lists(st.integers(1, 20), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
)
def test_repeated_and_late_parcels_count_every_request_once(order: list[int], sizes: list[int], rng: object) -> None:
    """An ingress sends what was not acknowledged again, in any order, with what it was before it ended."""
    ends = {n: outcome(n + 1, "int8" if n % 2 else "bf16", at_s=20.0 + n) for n in range(40)}
    seen, sent, sequence = evidence(), set(), 0
    while order:
        sequence += 1
        size = sizes[sequence % len(sizes)]
        chosen, order = order[:size], order[size:]
        records = [ends[n] if n % 3 or n in sent else opened(n + 1, 20.0 + n, ends[n].variant) for n in chosen]
        sent |= set(chosen)
        box = parcel(sequence, *records, sent_at_s=70.0)
        assert seen.take(box)
        assert not seen.take(box)
    finished = seen.n()
    assert sum(finished) <= len(sent)
    assert sum(seen.n()) == sum(sums.n_canary + sums.n_stable for sums in [seen.sums["error_rate"]])
    again = Evidence.from_dict(json.loads(json.dumps(seen.to_dict())))
    assert json.dumps(again.to_dict()) == json.dumps(seen.to_dict())


def test_memory_is_bounded_however_many_units_come() -> None:
    seen = evidence()
    for n in range(1000):
        first = 10 * n
        users = [
            outcome(first + k, at_s=20.0 + n, unit=f"{(first + k) * 2654435761 % 2**64:016x}") for k in range(1, 11)
        ]
        seen.take(parcel(n + 1, *users, sent_at_s=25.0 + n))
    sender = seen.senders["a"]
    assert len(seen.sums["ttft"].units) <= 4096
    assert (len(sender.done), len(sender.open)) == (0, 0)
    assert len(seen.seen_units) <= 20_000
    assert len(sender.unscored) <= 8192
