"""What one variant did in an experiment: sums by stratum, and what its answers cost and drifted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from serve.experiment.busy import Busy
from serve.experiment.clusters import Place, Ratio, Values
from serve.rollout.outcome import Drift, Outcome

__all__ = ["LATENCIES", "LOADS", "PROMPTS", "Arm", "stratum_of"]

LATENCIES: Final[Mapping[str, Callable[[Outcome], float | None]]] = {
    "ttft_s": lambda outcome: outcome.ttft_s,
    "itl_s": lambda outcome: outcome.itl_mean_s,
    "tpot_s": lambda outcome: outcome.tpot_s,
    "e2e_s": lambda outcome: outcome.e2e_s,
}
"""Each read off one request: ITL is the mean gap of a request, TPOT that of its choices."""

PROMPTS: Final = (32, 128, 512, 2048)
LOADS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""The last value of each bucket; a further one is open upwards. Powers of four, and half octaves."""


def stratum_of(outcome: Outcome) -> str:
    """`prompt bucket` `load bucket`, counted from 0."""
    return f"{_bucket(outcome.prompt_tokens, PROMPTS)} {_bucket(outcome.running_sequences, LOADS)}"


@dataclass
class Arm:
    """One variant. `latencies`: measure -> stratum -> values."""

    n: int = 0
    n_by_stratum: dict[str, int] = field(default_factory=dict)
    errors: Ratio = field(default_factory=Ratio)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    busy: Busy = field(default_factory=Busy)
    latencies: dict[str, dict[str, Values]] = field(default_factory=lambda: {name: {} for name in LATENCIES})
    drift: dict[str, Ratio] = field(default_factory=lambda: {name: Ratio() for name in _DRIFT})
    drift_requests: int = 0
    nonfinite_tokens: int = 0

    def count(self, outcome: Outcome, place: Place, *, settled: bool) -> None:
        """A request that ended. Latencies are those of answers that ended well, once queues have settled."""
        self.n += 1
        self.errors.add(place, float(outcome.error is not None))
        self.prompt_tokens += outcome.prompt_tokens
        self.completion_tokens += outcome.completion_tokens
        if outcome.finished_at_s is not None:
            self.busy.add(outcome.assigned_at_s, outcome.finished_at_s)
        if outcome.ok and settled:
            stratum = stratum_of(outcome)
            self.n_by_stratum[stratum] = self.n_by_stratum.get(stratum, 0) + 1
            for name, read in LATENCIES.items():
                if (value := read(outcome)) is not None and value > 0.0:
                    self.latencies[name].setdefault(stratum, Values()).add(place, value)

    def score(self, drift: Drift, place: Place) -> None:
        """How far one answer lay from the reference."""
        self.drift_requests += 1
        self.nonfinite_tokens += drift.nonfinite_tokens
        for name, read in _DRIFT.items():
            y, x = read(drift)
            if x:
                self.drift[name].add(place, y, x)

    def whole(self, measure: str) -> Values:
        """A latency over all strata."""
        total = Values()
        for values in self.latencies[measure].values():
            total = total.plus(values)
        return total

    def join_blocks(self) -> None:
        for sums in self._sums():
            sums.join_blocks()

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "errors": self.errors.to_dict(),
            "busy": self.busy.to_dict(),
            "latencies": {
                name: {stratum: values.to_dict() for stratum, values in strata.items()}
                for name, strata in self.latencies.items()
            },
            "drift": {name: ratio.to_dict() for name, ratio in self.drift.items()},
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Arm:
        return cls(
            **{name: mapping[name] for name in _PLAIN},
            errors=Ratio.from_dict(mapping["errors"]),
            busy=Busy.from_dict(mapping["busy"]),
            latencies={
                name: {stratum: Values.from_dict(values) for stratum, values in strata.items()}
                for name, strata in mapping["latencies"].items()
            },
            drift={name: Ratio.from_dict(ratio) for name, ratio in mapping["drift"].items()},
        )

    def _sums(self) -> Iterator[Ratio | Values]:
        yield self.errors
        yield from self.drift.values()
        for strata in self.latencies.values():
            yield from strata.values()


_PLAIN: Final = (
    "n", "n_by_stratum", "prompt_tokens", "completion_tokens", "drift_requests", "nonfinite_tokens",
)  # fmt: skip

_DRIFT: Final[Mapping[str, Callable[[Drift], tuple[float, int]]]] = {
    "kl_divergence_nats": lambda drift: (drift.kl_mean * drift.tokens, drift.tokens),
    "top1_agreement": lambda drift: (float(drift.top1_agreements), drift.tokens),
    "log_perplexity_ratio": lambda drift: (
        drift.nll_variant_nats - drift.nll_reference_nats,
        drift.nll_ratio_tokens,
    ),
}
"""Sums over scored tokens; a perplexity ratio only over those where it is fair."""


def _bucket(value: int, edges: tuple[int, ...]) -> int:
    return sum(value > edge for edge in edges)
