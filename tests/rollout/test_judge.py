from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from serve.rollout import Batch, Drift, Evidence, Expected, Outcome, Plan, Rules, StepSeen, Verdict, judge, plan_for

EXPECTED = Expected(kl_divergence=0.002, top1_agreement=0.98)
PLAN = plan_for("bf16", "int8", "int8", EXPECTED)


def traffic(
    change: Callable[[Outcome, random.Random], Outcome] | None = None,
    *,
    n: int = 6000,
    weight: float = 50.0,
    drift: float = 0.3,
    users: int = 500,
    canary_share: float | None = None,
) -> Evidence:
    """Plain traffic of many users, 5 requests a second; `change` is applied to what the canary served."""
    rng = random.Random(7)
    seen = Evidence(Rules("bf16", "int8", settle_s=0.0))
    seen.begin_step(StepSeen(0, weight, 1, 0.0))
    share = weight / 100.0 if canary_share is None else canary_share
    arms = [rng.random() < share for _ in range(users)]
    records = []
    for record in range(1, n + 1):
        user = rng.randrange(users)
        at_s = record / 5.0
        noise = rng.lognormvariate(0.0, 0.3)
        answer = Outcome(
            record, "int8" if arms[user] else "bf16", "sticky", 1, at_s, f"{user:016x}", at_s + 1.0,
            error="internal" if rng.random() < 0.01 else None, prompt_tokens=rng.randrange(10, 400),
            completion_tokens=rng.randrange(40, 80), ttft_s=0.1 * noise, itl_mean_s=0.02 * noise, e2e_s=1.0 * noise,
            running_sequences=rng.randrange(8),
        )  # fmt: skip
        if arms[user]:
            if rng.random() < drift:
                kl = 0.002 * rng.lognormvariate(0.0, 0.5)
                answer = replace(answer, drift=Drift(50, kl, 10 * kl, 50 - (rng.random() < 0.9)))
            answer = change(answer, rng) if change else answer
        records.append(answer)
    for start in range(0, n, 100):
        seen.take(Batch("a", 1 + start // 100, records[start].assigned_at_s, tuple(records[start : start + 100])))
    return seen


def slower(answer: Outcome, rng: random.Random) -> Outcome:
    return replace(answer, ttft_s=1.3 * (answer.ttft_s or 0), itl_mean_s=1.3 * (answer.itl_mean_s or 0), e2e_s=1.3)


def drifted(answer: Outcome, rng: random.Random) -> Outcome:
    """Damaged, and faster for it."""
    faster = replace(answer, ttft_s=0.05, itl_mean_s=0.01, e2e_s=0.5)
    return replace(faster, drift=answer.drift and Drift(50, 0.05, 0.9, 40))


def longer(answer: Outcome, rng: random.Random) -> Outcome:
    return replace(answer, completion_tokens=2 * answer.completion_tokens)


def failing(answer: Outcome, rng: random.Random) -> Outcome:
    return replace(answer, error="internal") if rng.random() < 0.05 else answer


def looping(answer: Outcome, rng: random.Random) -> Outcome:
    return replace(answer, looping=rng.random() < 0.1)


def guards(verdict: Verdict) -> dict[str, str]:
    return {finding.guard: finding.result for finding in verdict.findings}


def test_a_canary_like_stable_passes_every_guard() -> None:
    verdict = judge(PLAN, traffic(n=12_000))
    assert verdict.result == "pass", verdict.sentence
    assert set(guards(verdict).values()) == {"pass"}
    assert all(f.low is not None and f.low <= f.estimate <= f.high for f in verdict.findings)  # type: ignore[operator]
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


@pytest.mark.parametrize(
    ("change", "guard"),
    [
        (failing, "error_rate"),
        (drifted, "kl_divergence"),
        (slower, "itl"),
        (longer, "output_length"),
        (looping, "degenerate"),
    ],
)
def test_each_kind_of_damage_fails_on_its_own_guard(change: Callable[..., Outcome], guard: str) -> None:
    verdict = judge(PLAN, traffic(change))
    assert verdict.result == "fail"
    assert guards(verdict)[guard] == "fail"
    assert verdict.guard == guard or guard == "itl"
    assert verdict.e_value >= 20.0
    assert "n = " in verdict.sentence


def test_no_data_is_no_verdict() -> None:
    nothing = judge(PLAN, Evidence(Rules("bf16", "int8")))
    assert nothing.result == "no_data"
    undrifted = judge(PLAN, traffic(n=12_000, drift=0.0))
    assert undrifted.result == "inconclusive"
    assert guards(undrifted)["kl_divergence"] == "no_data"
    assert "KL divergence: no data" in undrifted.sentence


def test_little_data_is_inconclusive_and_says_what_is_missing() -> None:
    verdict = judge(PLAN, traffic(n=300))
    assert verdict.result == "inconclusive"
    assert "TTFT" in verdict.sentence


def test_a_hard_failure_comes_before_everything() -> None:
    seen = traffic(n=200)
    seen.incident("replica_died", 40.0)
    verdict = judge(PLAN, seen)
    assert (verdict.result, verdict.guard) == ("fail", "crash")
    assert "int8 replica died: 1 times, the limit is 1" in verdict.sentence


def test_a_split_that_was_not_dealt_as_configured_blocks_the_promotion() -> None:
    verdict = judge(PLAN, traffic(n=12_000, users=4000, canary_share=0.4))
    assert verdict.result == "inconclusive"
    assert "realised split" in verdict.sentence


def test_lost_records_block_the_promotion() -> None:
    seen = traffic(n=12_000)
    seen.take(Batch("a", 10_000, 3000.0, (), {"int8": 500}))
    verdict = judge(PLAN, seen)
    assert verdict.result == "inconclusive"
    assert verdict.blockers == ("500 records were lost on the way",)


def test_a_canary_that_answers_nobody_fails_without_statistics() -> None:
    def hang(answer: Outcome, rng: random.Random) -> Outcome:
        return replace(answer, error="deadline")

    verdict = judge(PLAN, traffic(hang, n=100))
    assert (verdict.result, verdict.guard) == ("fail", "unresponsive")


def test_a_small_load_on_the_canary_does_not_make_it_look_fast() -> None:
    """Latency grows with the batch; the canary is 20 % slower at every load, but runs small batches."""

    def alone(answer: Outcome, rng: random.Random) -> Outcome:
        return replace(answer, running_sequences=rng.randrange(3))

    seen = traffic(alone, n=1)
    rng = random.Random(3)
    records = []
    for record in range(2, 8000):
        canary = rng.random() < 0.3
        load = rng.randrange(4) if canary else rng.randrange(2, 16)
        itl_s = 0.02 * (1 + load / 4) * (1.2 if canary else 1.0) * rng.lognormvariate(0.0, 0.2)
        at_s = record / 5.0
        records.append(
            Outcome(
                record,
                "int8" if canary else "bf16",
                "sticky",
                1,
                at_s,
                None,
                at_s + 1.0,
                completion_tokens=50,
                ttft_s=itl_s,
                itl_mean_s=itl_s,
                e2e_s=50 * itl_s,
                running_sequences=load,
            )
        )
    seen.take(Batch("a", 99, 1.0, tuple(records)))
    itl = next(finding for finding in judge(PLAN, seen).findings if finding.guard == "itl")
    assert itl.estimate is not None
    assert 0.1 < itl.estimate < 0.3


def test_a_cap_of_the_operators_own_is_stricter_than_the_expected() -> None:
    strict = plan_for("bf16", "int8", "int8", EXPECTED, {"guards": {"kl_divergence": {"cap": 0.001}}})
    assert judge(strict, traffic()).guard == "kl_divergence"


def test_verdicts_name_numbers_a_person_can_check() -> None:
    verdict = judge(PLAN, traffic(slower))
    itl = next(finding for finding in verdict.findings if finding.guard == "itl")
    assert itl.sentence.startswith("ITL +")
    assert f"n = {itl.n_canary} canary, {itl.n_stable} stable" in itl.sentence


def test_the_plan_may_be_of_one_guard() -> None:
    one = Plan("bf16", "int8", guards={"error_rate": PLAN.guards["error_rate"]})
    assert judge(one, traffic(n=12_000)).result == "pass"
