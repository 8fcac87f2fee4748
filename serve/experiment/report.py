"""From sums to what a person reads: JSON-ready, every number with its interval, and sentences that claim no more.

Three views of a latency, because a variant with little traffic runs small batches and looks fast:

* `ttft_s` ...: what its users met, whatever the load was;
* `at_common_mix`: what they would have met, had all arms seen the same prompts at the same load (the strata that every
  arm has met, weighted by their share of all requests; `coverage_ratio` is the share of requests in them);
* `comparisons`: the relative difference from the baseline within fine strata and along the exact load, as a rollout
  judges it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp, log, log1p, sqrt
from typing import Any, Final

from serve.carbon import co2_grams_per_million
from serve.experiment.arm import LATENCIES, LOADS, PROMPTS, Arm
from serve.experiment.clusters import Values
from serve.experiment.intervals import ALPHA, Interval, mean_interval, quantile_interval, share_interval
from serve.experiment.tally import COMPARED, HELD_OUT, Tally
from serve.rollout.sequential import beta_binomial_log_e, critical_z
from serve.rollout.sums import Sums

__all__ = ["Facts", "report"]

_QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_LEAST_IN_STRATUM: Final = 10
_LEAST_PER_ARM: Final = 50
_LEAST_BLOCKS: Final = 5
_SPLIT_ALPHA: Final = 0.001
_EFFECT: Final = log1p(0.1)
_CERTAIN: Final = 0.01  # of the effect looked for: nothing is known more exactly, however alike the values


@dataclass(frozen=True)
class Facts:
    """What the controller knows of a variant beside its outcomes. Joules, and the tokens that were made for them, are
    those since the start; `energy_measured` says how they were measured, or why they were not."""

    precision: str = ""
    replicas: int = 1
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    memory_saved_ratio: float | None = None
    energy_joules: float | None = None
    generation_tokens: float = 0.0
    energy_measured: str | None = None
    co2_grams_per_kwh: float | None = None


def report(tally: Tally, facts: Mapping[str, Facts], at_s: float) -> dict[str, Any]:
    """Everything but the experiment's own description. `at_s`: now, or when it ended."""
    elapsed_s = max(0.0, at_s - tally.since_s)
    mix, coverage = _common_mix(tally)
    return {
        "at_s": at_s,
        "elapsed_s": elapsed_s,
        "confidence": 1.0 - ALPHA,
        "block_s": tally.width_s,
        "lost": sum(tally.lost.values()),
        "left_out": dict(tally.left_out),
        "split": _split(tally),
        "variants": [
            {
                "variant": name,
                **_outcomes(tally, name, arm, elapsed_s),
                "at_common_mix": {"coverage_ratio": coverage, **_mixed(arm, mix)},
                **_cost(tally, arm, facts.get(name, Facts()), elapsed_s),
                "drift": _drift(arm),
                **_standing(facts.get(name, Facts())),
            }
            for name, arm in tally.arms.items()
        ],
        "comparisons": [
            _comparison(tally, name, measure, sums)
            for name, by in tally.contrasts.items()
            for measure, sums in by.items()
        ],
        "strata": _strata(tally),
    }


Parts = list[tuple[float, Values]]


def _at_least_zero(value: float) -> float:
    """Of what cannot be less, an interval says nothing below."""
    return max(0.0, value)


def _latencies(read: Callable[[str], Parts]) -> dict[str, Any]:
    return {measure: _spread(read(measure)) for measure in LATENCIES}


def _mixed(arm: Arm, mix: Mapping[str, float]) -> dict[str, Any]:
    """What the arm's requests in each stratum make, each stratum at its weight."""
    return _latencies(lambda name: [(weight, arm.latencies[name].get(s, Values())) for s, weight in mix.items()])


def _spread(parts: Parts) -> dict[str, Any]:
    parts = [(weight, values) for weight, values in parts if values.n]
    whole = sum(weight for weight, _ in parts)
    parts = [(weight / whole, values) for weight, values in parts]
    return {
        "n": sum(values.n for _, values in parts),
        "mean": mean_interval([(weight, values.mean) for weight, values in parts]).map(_at_least_zero).to_dict(),
        **{name: quantile_interval(parts, p).to_dict() for name, p in _QUANTILES.items()},
    }


def _outcomes(tally: Tally, name: str, arm: Arm, elapsed_s: float) -> dict[str, Any]:
    busy_s = arm.busy.total_s
    return {
        "n": arm.n,
        "units": tally.assigned.get(name, 0),
        "blocks": len(arm.errors.blocks),
        **_latencies(lambda measure: [(1.0, arm.whole(measure))]),
        "errors": round(arm.errors.y),
        "error_rate": share_interval(arm.errors).to_dict(),
        "prompt_tokens": arm.prompt_tokens,
        "completion_tokens": arm.completion_tokens,
        "tokens_per_s": arm.completion_tokens / elapsed_s if elapsed_s else None,
        "busy_ratio": min(1.0, busy_s / elapsed_s) if elapsed_s else None,
        "tokens_per_busy_s": arm.completion_tokens / busy_s if busy_s else None,
    }


def _cost(tally: Tally, arm: Arm, fact: Facts, elapsed_s: float) -> dict[str, Any]:
    """Per million completion tokens: for all the time that the replicas stood ready, and for the time they worked."""
    price, millions = tally.plan.price_per_hour, arm.completion_tokens / 1e6
    hourly = None if price is None or not millions else price * fact.replicas / 3600.0 / millions
    return {
        "cost_per_million_tokens": None if hourly is None else hourly * elapsed_s,
        "cost_per_million_tokens_busy": None if hourly is None else hourly * arm.busy.total_s,
    }


def _drift(arm: Arm) -> dict[str, Any] | None:
    if not arm.drift_requests:
        return None
    ratio = mean_interval([(1.0, arm.drift["log_perplexity_ratio"])], scale=0.02).map(exp)
    return {
        "requests": arm.drift_requests,
        "tokens": round(arm.drift["kl_divergence_nats"].x),
        "nonfinite_tokens": arm.nonfinite_tokens,
        "kl_divergence_nats": mean_interval([(1.0, arm.drift["kl_divergence_nats"])]).map(_at_least_zero).to_dict(),
        "top1_agreement": _at_most_one(mean_interval([(1.0, arm.drift["top1_agreement"])], scale=0.02)).to_dict(),
        "perplexity_ratio": ratio.to_dict(),
    }


def _at_most_one(interval: Interval) -> Interval:
    return interval.map(lambda value: min(value, 1.0))


def _standing(fact: Facts) -> dict[str, Any]:
    joules, tokens = fact.energy_joules, fact.generation_tokens
    per_token = joules / tokens if joules is not None and tokens else None
    return {
        "precision": fact.precision,
        "replicas": fact.replicas,
        "memory_bytes": dict(fact.memory_bytes),
        "memory_saved_ratio": fact.memory_saved_ratio,
        "energy_joules_per_token": per_token,
        "energy_measured": fact.energy_measured,
        "co2_grams_per_million_tokens": co2_grams_per_million(per_token, fact.co2_grams_per_kwh),
    }


def _common_mix(tally: Tally) -> tuple[dict[str, float], float]:
    """The weight of each stratum that every arm has met, and the share of all requests that lie in them."""
    arms = tally.arms.values()
    strata = {stratum for arm in arms for stratum in arm.n_by_stratum}
    met = {s: sum(arm.n_by_stratum.get(s, 0) for arm in arms) for s in strata}
    common = {s: met[s] for s in strata if all(arm.n_by_stratum.get(s, 0) >= _LEAST_IN_STRATUM for arm in arms)}
    whole, total = sum(common.values()), sum(met.values())
    return {s: n / whole for s, n in sorted(common.items())}, whole / total if total else 0.0


def _strata(tally: Tally) -> list[dict[str, Any]]:
    met = {stratum for arm in tally.arms.values() for stratum in arm.n_by_stratum}
    return [
        {
            "prompt_tokens": _range(PROMPTS, prompt),
            "running_sequences": _range(LOADS, load),
            "rows": _rows(tally, f"{prompt} {load}"),
        }
        for prompt, load in sorted(tuple(map(int, stratum.split())) for stratum in met)
    ]


def _rows(tally: Tally, stratum: str) -> list[dict[str, Any]]:
    return [
        {"variant": name, "n": arm.n_by_stratum[stratum], **_mixed(arm, {stratum: 1.0})}
        for name, arm in tally.arms.items()
        if stratum in arm.n_by_stratum
    ]


def _range(edges: tuple[int, ...], index: int) -> str:
    low = edges[index - 1] + 1 if index else 1
    if index == len(edges):
        return f"{low}+"
    return str(low) if low == edges[index] else f"{low}-{edges[index]}"


def _split(tally: Tally) -> dict[str, Any]:
    """The realised split against the configured one: one bet per arm against all that come after it, multiplied."""
    plan, assigned = tally.plan, tally.assigned
    held_out = plan.holdout / 100.0
    configured = {name: (1.0 - held_out) * plan.weights[name] / 100.0 for name in plan.arms}
    if held_out:
        configured[HELD_OUT] = held_out
    total, log_e, rest, n_rest = sum(assigned.values()), 0.0, 1.0, sum(assigned.values())
    for name, share in list(configured.items())[:-1]:
        n_rest -= assigned.get(name, 0)
        log_e += beta_binomial_log_e(assigned.get(name, 0), n_rest, share / rest)
        rest -= share
    strangers = set(assigned) - set(configured)
    matches = log_e < -log(_SPLIT_ALPHA) and not any(assigned[name] for name in strangers)
    return {
        "unit": "users" if len(tally.units) >= tally.anonymous else "requests",
        "matches": matches,
        "e_value": exp(min(log_e, 700.0)),
        "sentence": _split_sentence(matches, total),
        "arms": [
            {
                "arm": name,
                "configured_ratio": configured.get(name, 0.0),
                "realised_ratio": assigned.get(name, 0) / total if total else None,
                "units": assigned.get(name, 0),
            }
            for name in [*configured, *sorted(name for name in strangers if assigned[name])]
        ],
    }


def _split_sentence(matches: bool, total: int) -> str:
    if not total:
        return "nobody was dealt to an arm yet"
    if matches:
        return "the realised split agrees with the configured one"
    return "the realised split is not the configured one: find out why before you believe any difference below"


def _comparison(tally: Tally, name: str, measure: str, sums: Sums) -> dict[str, Any]:
    how = COMPARED[measure]
    enough = min(sums.n_canary, sums.n_stable) >= _LEAST_PER_ARM and sums.blocks >= _LEAST_BLOCKS
    low = high = None
    if enough:
        variance = max(sums.variance, (_CERTAIN * _EFFECT) ** 2)
        half = critical_z(variance, _EFFECT, ALPHA / 2.0) * sqrt(variance)
        low, high = how.shown(sums.estimate - half), how.shown(sums.estimate + half)
    estimate = how.shown(sums.estimate) if sums.n_canary and sums.n_stable else None
    result, sentence = _verdict(how.label, name, tally.plan.baseline, Interval(estimate, low, high))
    return {
        "variant": name,
        "baseline": tally.plan.baseline,
        "measure": measure,
        "change_ratio": Interval(estimate, low, high).to_dict(),
        "n_variant": sums.n_canary,
        "n_baseline": sums.n_stable,
        "result": result,
        "sentence": sentence,
    }


def _verdict(label: str, name: str, baseline: str, change: Interval) -> tuple[str, str]:
    if change.estimate is None or change.low is None or change.high is None:
        return "too little data", f"{label} of {name}: too little data yet"
    between = f"between {100 * change.low:+.1f} and {100 * change.high:+.1f} %"
    if change.low <= 0.0 <= change.high:
        return "no difference shown", f"{label} of {name} differs from that of {baseline} by {between}: none is shown"
    word = "lower" if change.high < 0.0 else "higher"
    size = f"{100 * abs(change.estimate):.1f} % {word}"
    return word, f"{label} of {name} is {size} than that of {baseline} at equal load, {between}"
