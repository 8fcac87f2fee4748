"""The table in docs/ROLLOUTS.md: `python -m tests.rollout.measure [--rollouts 500] [CASE ...]`, one line per case.

All guards together, looking after every outcome, on fixed seeds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from serve.rollout import Expected, Plan, plan_for
from tests.rollout.lockstep import Fates, play
from tests.rollout.simulation import Effect, Steps, World

__all__ = ["CASES", "Case", "default_plan"]

HALF: Steps = ((0, 50.0),)
RAMP: Steps = ((0, 5.0), (2000, 10.0), (4000, 25.0), (8000, 50.0))
HARSH = replace(World(), zipf=1.1, luck_deviation=0.6, hangs_per_hour=2.0, lingering_deviation=0.08)


@dataclass(frozen=True)
class Case:
    """One world and one truth, for `requests` outcomes in all."""

    title: str
    world: World
    effect: Effect
    requests: int
    steps: Steps = HALF

    def play(self, rollouts: int, seed: int = 1) -> Fates:
        return play(
            default_plan(self.world), self.world, self.effect, rollouts=rollouts, requests=self.requests,
            steps=self.steps, seed=seed,
        )  # fmt: skip


def default_plan(world: World) -> Plan:
    """The default plan with the world's quality as expected, less the guard that the world does not produce."""
    expected = Expected(kl_divergence=world.kl_nats, top1_agreement=world.top1)
    return plan_for("bf16", "int8", "int8", expected, {"guards": {"degenerate": None}})


CASES = {
    "same": Case("no difference", World(), Effect(), 20_000),
    "same-ramp": Case("no difference, 5 → 10 → 25 → 50 %", World(), Effect(), 20_000, RAMP),
    "same-plain": Case("no difference, independent requests", World().plain(), Effect(), 20_000),
    "same-harsh": Case("no difference, two hangs an hour, heavier users", HARSH, Effect(), 20_000),
    "errors": Case("error rate doubled, 1 → 2 %", World(), Effect(failures=2.0), 16_000),
    "errors-plain": Case("the same, independent requests", World().plain(), Effect(failures=2.0), 16_000),
    "errors-harsh": Case("the same, harsh world", HARSH, Effect(failures=2.0), 16_000),
    "latency": Case("20 % slower", World(), Effect(latency=1.2), 8_000),
    "latency-plain": Case("the same, independent requests", World().plain(), Effect(latency=1.2), 8_000),
    "small": Case("2 % slower, margin 10 %", World(), Effect(latency=1.02), 20_000),
    "small-ramp": Case("the same, 5 → 10 → 25 → 50 %", World(), Effect(latency=1.02), 20_000, RAMP),
    "slow": Case("50 % slower: its queue grows", World(), Effect(latency=1.5), 6_500),
    "drift": Case("KL twice as expected, 10 % faster", World(), Effect(kl=2.0, latency=0.9), 20_000),
}


def _line(name: str, case: Case, rollouts: int) -> str:
    fates = case.play(rollouts)
    failed, passed = fates.failed_at >= 0, fates.passed_at >= 0
    to_fail = f"{np.median(fates.failed_per_arm[failed]):.0f}" if failed.any() else "–"
    to_pass = f"{np.median(fates.passed_at[passed]):.0f}" if passed.any() else "–"
    by = ", ".join(f"{guard} {count}" for guard, count in Counter(g for g in fates.guard if g).most_common(3))
    within = f"{100 * fates.failed(3000):.1f} / {100 * fates.failed(6000):.1f}"
    share = f"{100 * fates.failed():.1f} % | {within} % | {100 * fates.promoted:.1f} %"
    return f"| {name} | {case.title} | {rollouts} | {share} | {to_fail} | {to_pass} | {by or '–'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=[], help=", ".join(CASES))
    parser.add_argument("--rollouts", type=int, default=500)
    chosen = parser.parse_args()
    heads = (
        "case", "truth", "rollouts", "rolled back", "within 3000 / 6000 per arm", "promoted",
        "median per arm to roll back", "median requests to promote", "by guard",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in chosen.cases or CASES:
        print(_line(name, CASES[name], chosen.rollouts), flush=True)


if __name__ == "__main__":
    main()
