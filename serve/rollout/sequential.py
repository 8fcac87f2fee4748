"""Statistics that stay valid however often one looks.

A dashboard is watched all day, and a controller looks once a second. A p-value is valid for one look, planned
beforehand; looking again and again, it will cross 0.05 sooner or later whatever is true. An **e-process** is the
repair. It is a bet against the null hypothesis that starts with one coin and that nobody can expect to grow while
the null holds: E[e] <= 1 at every moment, stopped whenever one likes. By Ville's inequality the chance that it
*ever* reaches 1/alpha is then at most alpha. So: look after every outcome, and act at e >= 1/alpha. (Ramdas et al.,
"Game-theoretic statistics and safe anytime-valid inference", arXiv 2210.01948.)

Four bets are enough here. Each spreads its coin over many alternatives, a *mixture*, since nobody knows the effect
size.

* `normal_mixture_log_e`: a mean, or a difference of means, known by an estimate and its variance. The mixture over
  effects is half a normal: Robbins' mixture, the mSPRT of Johari et al. (arXiv 1512.04922), one-sided. With an
  *estimated* variance it is an asymptotic confidence sequence (Waudby-Smith et al., arXiv 2103.06476): the
  guarantee holds as units accumulate, so the judge asks for a minimum of them. Turned round it gives an interval at
  all times.
* `rate_ratio_log_e`: failures in two arms. Each failure falls on the canary with the probability theta * n_canary /
  (theta * n_canary + n_stable), where theta is the ratio of the failure rates; the null says theta <= 1. The
  mixture is a grid over theta, so that steps with unlike shares of traffic multiply into one bet (a Beta prior on
  the share itself could not carry over from 5 % to 50 %). `design_effect` weakens it to the number of independent
  failures (Rao & Scott 1992): twenty failures in one hang are one event.
* `beta_binomial_log_e`: a count against a known probability, two-sided: the classic mixture, whose integral over a
  Beta prior has a closed form. It watches the realised split (Lindon & Malek, arXiv 2011.03567).
* `merge`: several bets on one null, whatever their dependence: their weighted average is again a bet, and among
  symmetric ways to merge it is the only admissible one (Vovk & Wang, arXiv 1912.06116). Better than Bonferroni.

Everything is in natural logarithms, so that overwhelming evidence does not overflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import erfc, exp, inf, lgamma, log, log1p, sqrt
from typing import Final

__all__ = [
    "RATE_RATIOS",
    "beta_binomial_log_e",
    "critical_z",
    "harm_log_e",
    "merge",
    "normal_mixture_log_e",
    "rate_ratio_log_e",
]

# (rate ratio, share of the coin): mostly on what a broken build looks like, some on subtle and on total failure.
RATE_RATIOS: tuple[tuple[float, float], ...] = ((1.4, 0.15), (2.0, 0.5), (3.5, 0.2), (10.0, 0.15))

_FAR: Final = 5.0
_FAR_COIN: Final = 0.25


def normal_mixture_log_e(excess: float, variance: float, scale: float) -> float:
    """log e against "the effect is <= the null", for an estimate that lies `excess` above the null.

    variance: squared standard error of the estimate. scale: effects above the null are bet on as |N(0, scale^2)|.
    """
    if variance <= 0.0:
        return 0.0
    spread = scale * scale / (variance + scale * scale)
    z = excess / sqrt(variance) * sqrt(spread)
    return 0.5 * log1p(-spread) + 0.5 * z * z + _log_twice_normal_cdf(z)


def harm_log_e(excess: float, variance: float, scale: float) -> float:
    """The same bet with some of the coin on effects `_FAR` times larger, so that gross harm is found at once too."""
    near = normal_mixture_log_e(excess, variance, scale)
    far = normal_mixture_log_e(excess, variance, _FAR * scale)
    return merge({"near": near, "far": far}, {"near": 1.0 - _FAR_COIN, "far": _FAR_COIN})


def critical_z(variance: float, scale: float, alpha: float) -> float:
    """How many standard errors an estimate must lie above the null for e = 1/alpha: half the width of the interval."""
    low, high = 0.0, 1.0
    while normal_mixture_log_e(high * sqrt(variance), variance, scale) < -log(alpha):
        low, high = high, 2.0 * high
    for _ in range(40):
        middle = 0.5 * (low + high)
        below = normal_mixture_log_e(middle * sqrt(variance), variance, scale) < -log(alpha)
        low, high = (middle, high) if below else (low, middle)
    return high


def rate_ratio_log_e(
    tables: Iterable[tuple[float, float, float, float]],
    design_effect: float = 1.0,
    prior: Sequence[tuple[float, float]] = RATE_RATIOS,
) -> float:
    """log e against "the canary fails no more often than stable".

    tables: per stratum (canary failures, stable failures, canary requests, stable requests), strata of constant weight.
    design_effect: variance of the failure counts over that of independent failures, >= 1.
    """
    kept = [table for table in tables if table[2] > 0 and table[3] > 0]
    terms = [
        log(share) + sum(_log_likelihood_ratio(theta, *table) for table in kept) / design_effect
        for theta, share in prior
    ]
    return _log_sum_exp(terms)


def beta_binomial_log_e(successes: float, failures: float, probability: float, strength: float = 20.0) -> float:
    """log e against "each trial succeeds with exactly `probability`"; the prior is a Beta worth `strength` trials."""
    a, b = strength * probability, strength * (1.0 - probability)
    if a <= 0.0 or b <= 0.0:
        return inf if (failures if b <= 0.0 else successes) else 0.0
    marginal = _log_beta(a + successes, b + failures) - _log_beta(a, b)
    return marginal - successes * log(probability) - failures * log1p(-probability)


def merge(log_e_values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """log of the weighted mean of e-values; a bet without a weight takes no part."""
    terms = [log(weights[name]) + value for name, value in log_e_values.items() if weights.get(name, 0.0) > 0.0]
    return _log_sum_exp(terms) if terms else 0.0


def _log_likelihood_ratio(theta: float, failed: float, failed_stable: float, n: float, n_stable: float) -> float:
    """Of "each failure is `theta` times as likely per canary request" against "just as likely"."""
    share = n / (n + n_stable)
    return failed * log(theta) - (failed + failed_stable) * log(theta * share + 1.0 - share)


def _log_twice_normal_cdf(z: float) -> float:
    if z > -30.0:
        return log(erfc(-z / sqrt(2.0)))
    return -0.5 * z * z - log(-z) - 0.5 * log(3.141592653589793 / 2.0)  # the tail's asymptote; erfc would underflow


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)


def _log_sum_exp(terms: Sequence[float]) -> float:
    top = max(terms)
    return top if top in (inf, -inf) else top + log(sum(exp(term - top) for term in terms))
