"""What a guard can watch: how a number is read off an outcome, and what makes two requests comparable.

Three kinds. A **rate** is a failure that both arms can have (and is judged by counts, then by the difference of rates).
A **contrast** is a number that both arms have, compared within strata of like load and like length. A **level** is
already a comparison, with the reference's logits, and needs the canary alone.

Latencies are compared at equal load, which hides how much load a slow canary makes for itself; `e2e_own_load` is there
for the gross case, and wants a wide margin, since a heavy user on one arm loads that arm too.

Higher is worse, except for an agreement, which is summed with the opposite `sign`; `output_length` is bad either way.
Latencies and lengths are compared as logarithms, so a margin of 0.10 means "10 % longer".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import expm1, log, log2
from typing import Final, Literal

from serve.rollout.outcome import Drift, Outcome

__all__ = ["LATENCIES", "MEASURES", "Kind", "Measure"]

Kind = Literal["rate", "contrast", "level"]


@dataclass(frozen=True)
class Measure:
    """One thing to watch. `value` gives None where the outcome does not show it.

    ratio: values are logarithms of something positive; margins and estimates are shown as a relative change.
    stratum, load: only like is compared with like; within a stratum the exact load is allowed for along a line.
    discount: how fast the requests of one unit lose weight (see `sums`); about the share of variance between users.
    """

    name: str
    kind: Kind
    label: str
    value: Callable[[Outcome], float | None]
    stratum: Callable[[Outcome], str] = lambda _: ""
    load: Callable[[Outcome], float] = lambda _: 0.0
    ratio: bool = False
    latency: bool = False
    two_sided: bool = False
    sign: float = 1.0
    discount: float = 0.3

    def shown(self, value: float) -> float:
        """From the scale that is summed to the guard's own unit."""
        return expm1(value) if self.ratio else self.sign * value

    def text(self, shown: float) -> str:
        """A shown value for a sentence."""
        if self.kind == "level" and not self.ratio:
            return f"{shown:.3g}"
        return f"{100.0 * shown:+.2f} %" if self.ratio else f"{100.0 * shown:+.2f} points"


def _bucket(value: float, base: float, count: int) -> int:
    """Powers of `base`, the last open upwards."""
    return min(int(log(max(value, 1.0)) / log(base) + 1e-9), count - 1)


def _octaves(outcome: Outcome) -> float:
    """The exact load: octaves of sequences that the request was run with."""
    return log2(outcome.running_sequences + 1.0)


def _load(outcome: Outcome) -> str:
    return str(_bucket(outcome.running_sequences + 1, 2.0, 8))


def _load_and_prompt(outcome: Outcome) -> str:
    return f"{_load(outcome)} {_bucket(outcome.prompt_tokens, 2.0, 17)}"


def _answer(outcome: Outcome) -> str:
    return str(_bucket(outcome.completion_tokens, 1.5, 20))


def _load_and_answer(outcome: Outcome) -> str:
    return f"{_load(outcome)} {_answer(outcome)}"


def _logarithm(value: float | None) -> float | None:
    return log(value) if value is not None and value > 0.0 else None


def _of_success(read: Callable[[Outcome], float | None]) -> Callable[[Outcome], float | None]:
    return lambda outcome: _logarithm(read(outcome)) if outcome.ok else None


def _degenerate(outcome: Outcome) -> float | None:
    """Empty or looping answers, among those that ended well; an answer that was asked to be empty does not count."""
    return float(outcome.looping or outcome.empty or outcome.completion_tokens == 0) if outcome.ok else None


def _of_drift(read: Callable[[Drift], float | None]) -> Callable[[Outcome], float | None]:
    return lambda outcome: read(outcome.drift) if outcome.drift and outcome.drift.tokens else None


def _log_perplexity_ratio(drift: Drift) -> float | None:
    tokens = drift.nll_ratio_tokens
    return (drift.nll_variant_nats - drift.nll_reference_nats) / tokens if tokens else None


_ALL: Final = (
    Measure("error_rate", "rate", "error rate", lambda outcome: float(outcome.error is not None), discount=0.0005),
    Measure("degenerate", "rate", "empty or looping answers", _degenerate, discount=0.0005),
    Measure(
        "ttft",
        "contrast",
        "TTFT",
        _of_success(lambda o: o.ttft_s),
        _load_and_prompt,
        _octaves,
        ratio=True,
        latency=True,
    ),
    Measure("itl", "contrast", "ITL", _of_success(lambda o: o.itl_mean_s), _load, _octaves, ratio=True, latency=True),
    Measure(
        "e2e", "contrast", "E2E", _of_success(lambda o: o.e2e_s), _load_and_answer, _octaves, ratio=True, latency=True
    ),
    # Whatever the load: a canary that is so slow that its queue grows meets stable at no common load any more.
    Measure(
        "e2e_own_load",
        "contrast",
        "E2E at its own load",
        _of_success(lambda o: o.e2e_s),
        _answer,
        ratio=True,
        latency=True,
    ),
    Measure(
        "output_length",
        "contrast",
        "output length",
        _of_success(lambda o: float(o.completion_tokens)),
        ratio=True,
        two_sided=True,
    ),
    Measure("kl_divergence", "level", "KL divergence", _of_drift(lambda d: d.kl_mean)),
    Measure("top1_agreement", "level", "top-1 agreement", _of_drift(lambda d: -d.top1_agreement), sign=-1.0),
    Measure("perplexity_ratio", "level", "perplexity ratio", _of_drift(_log_perplexity_ratio), ratio=True),
    Measure("flips", "level", "flipped answers", _of_drift(lambda d: None if d.flipped is None else float(d.flipped))),
)

MEASURES: Final = {measure.name: measure for measure in _ALL}
LATENCIES: Final = tuple(measure.name for measure in _ALL if measure.latency)
