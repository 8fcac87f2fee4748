from __future__ import annotations

import random
from math import exp, inf, lgamma, log, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.rollout.sequential import (
    RATE_RATIOS,
    beta_binomial_log_e,
    critical_z,
    merge,
    normal_mixture_log_e,
    rate_ratio_log_e,
)
from serve.rollout.sums import Sums


def integrate(density, low: float, high: float, steps: int = 20_000) -> float:  # type: ignore[no-untyped-def]
    width = (high - low) / steps
    return sum(density(low + (index + 0.5) * width) for index in range(steps)) * width


@pytest.mark.parametrize(("excess", "variance", "scale"), [(0.1, 0.002, 0.1), (-0.2, 0.01, 0.3), (0.02, 0.5, 0.05)])
def test_the_normal_mixture_is_the_average_likelihood_ratio_over_half_a_normal(
    excess: float, variance: float, scale: float
) -> None:
    def density(effect: float) -> float:
        ratio = exp((excess * effect - effect * effect / 2.0) / variance)
        return ratio * 2.0 * exp(-effect * effect / (2.0 * scale * scale)) / (scale * sqrt(2.0 * 3.141592653589793))

    assert exp(normal_mixture_log_e(excess, variance, scale)) == pytest.approx(
        integrate(density, 0, 8 * scale), rel=1e-4
    )


def test_a_beta_binomial_bet_is_the_average_likelihood_ratio_over_its_prior() -> None:
    a, b, p = 4.0, 16.0, 0.2
    norm = exp(lgamma(a + b) - lgamma(a) - lgamma(b))

    def density(q: float) -> float:
        return norm * q ** (a - 1) * (1 - q) ** (b - 1) * (q / p) ** 30 * ((1 - q) / (1 - p)) ** 70

    assert exp(beta_binomial_log_e(30, 70, p)) == pytest.approx(integrate(density, 0, 1), rel=1e-4)
    assert beta_binomial_log_e(1, 0, 0.0) == inf
    assert beta_binomial_log_e(0, 5, 0.0) == 0.0


def test_every_bet_on_counts_is_fair_to_the_last_coin() -> None:
    """Over all outcomes of a few trials under the null, the e-value is 1 on average. Exactly."""
    n, p = 8, 0.3
    fair = sum(
        exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) * p**k * (1 - p) ** (n - k)
        * exp(beta_binomial_log_e(k, n - k, p)) for k in range(n + 1)
    )  # fmt: skip
    assert fair == pytest.approx(1.0)
    share = 0.25  # of the traffic is the canary's: so is each failure, if the rates are equal
    fair = sum(
        exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) * share**k * (1 - share) ** (n - k)
        * exp(rate_ratio_log_e([(k, n - k, 100, 300)])) for k in range(n + 1)
    )  # fmt: skip
    assert fair == pytest.approx(1.0)


def test_strata_of_unlike_weight_multiply_into_one_bet() -> None:
    assert sum(coin for _, coin in RATE_RATIOS) == pytest.approx(1.0)
    low, high = (2, 10, 50, 950), (20, 12, 500, 500)
    one = rate_ratio_log_e([low, high], prior=[(2.0, 1.0)])
    assert one == pytest.approx(sum(rate_ratio_log_e([table], prior=[(2.0, 1.0)]) for table in (low, high)))
    assert rate_ratio_log_e([(0, 50, 0, 1000)]) == pytest.approx(0.0)


def test_a_burst_counts_for_as_much_as_its_design_effect_leaves() -> None:
    counts = [(30.0, 10.0, 1000.0, 1000.0)]
    assert rate_ratio_log_e(counts, 4.0) == pytest.approx(rate_ratio_log_e([(7.5, 2.5, 250.0, 250.0)]))


@given(st.floats(1e-6, 1.0), st.floats(1e-3, 1.0), st.floats(1e-4, 0.4))
def test_the_critical_value_is_where_the_bet_pays(variance: float, scale: float, alpha: float) -> None:
    z = critical_z(variance, scale, alpha)
    assert normal_mixture_log_e(z * sqrt(variance), variance, scale) == pytest.approx(-log(alpha), abs=1e-6)


def test_an_overwhelming_bet_does_not_overflow() -> None:
    assert normal_mixture_log_e(1e3, 1e-6, 0.1) > 1e9
    assert normal_mixture_log_e(-1e3, 1e-6, 0.1) < 0.0
    assert rate_ratio_log_e([(1e6, 0.0, 1e6, 1e6)]) > 1e5


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(-50, 50), min_size=1))
def test_a_merged_bet_is_the_average_and_never_more_than_the_best(bets: dict[str, float]) -> None:
    weights = {name: 1.0 / len(bets) for name in bets}
    mean = sum(exp(value) for value in bets.values()) / len(bets)
    assert merge(bets, weights) == pytest.approx(log(mean), abs=1e-9)
    assert merge(bets, weights) <= max(bets.values()) + 1e-9


def _ever_crosses(draw, looks: int, alpha: float) -> bool:  # type: ignore[no-untyped-def]
    total = squares = 0.0
    for n in range(1, looks + 1):
        value = draw()
        total, squares = total + value, squares + value * value
        if n >= 50 and normal_mixture_log_e(total / n, squares / n / n, 0.1) >= -log(alpha):
            return True
    return False


def test_looking_after_every_outcome_keeps_the_promise_where_a_z_test_breaks_it() -> None:
    rng = random.Random(1)
    false_alarms = sum(_ever_crosses(lambda: rng.gauss(0.0, 1.0), 2000, 0.05) for _ in range(200)) / 200
    assert false_alarms <= 0.05

    def naive() -> bool:
        total = 0.0
        for n in range(1, 2001):
            total += rng.gauss(0.0, 1.0)
            if n >= 50 and total / sqrt(n) > 1.645:
                return True
        return False

    assert sum(naive() for _ in range(200)) / 200 > 0.2


class TestOracles:
    """Against other people's programs, where they are installed (`pip install ville spotify-confidence`)."""

    def test_ville_has_the_same_beta_binomial(self) -> None:
        ville = pytest.importorskip("ville")
        rng = random.Random(2)
        draws = [float(rng.random() < 0.13) for _ in range(500)]
        theirs = ville.BernoulliTest(0.1, prior=(2.0, 18.0))
        theirs.update(draws)
        ours = beta_binomial_log_e(sum(draws), 500 - sum(draws), 0.1, strength=20.0)
        assert ours == pytest.approx(float(theirs.log_e_values_[-1]), abs=1e-9)

    @pytest.mark.parametrize("variance", [1e-4, 0.003, 0.2])
    def test_ville_has_the_same_one_sided_boundary(self, variance: float) -> None:
        ville = pytest.importorskip("ville")
        scale, alpha = 0.1, 0.05
        boundary = float(ville.normal_mixture(1.0 / variance, alpha, 1.0 / scale**2, one_sided=True))
        assert critical_z(variance, scale, alpha) * sqrt(variance) == pytest.approx(boundary * variance, rel=1e-6)

    def test_ville_has_the_same_sequential_test_but_for_the_second_side(self) -> None:
        """Where the mean lies on the watched side, half a normal prior gains up to a factor of two over a whole one."""
        ville = pytest.importorskip("ville")
        rng = random.Random(3)
        draws = [rng.gauss(0.18, 0.5) for _ in range(2000)]
        theirs = ville.MSPRT(0.0, sigma=0.5, tau=0.1, alpha=0.05)
        theirs.update(draws)
        total, compared = 0.0, 0
        for n, (value, log_e) in enumerate(zip(draws, theirs.log_e_values_, strict=True), start=1):
            total += value
            if total > 0.0:
                gain = normal_mixture_log_e(total / n, 0.25 / n, 0.1) - float(log_e)
                assert -1e-9 <= gain <= log(2.0) + 1e-9
                compared += 1
        assert compared > 1900

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # theirs
    def test_spotify_confidence_estimates_the_same_difference_and_error(self) -> None:
        confidence = pytest.importorskip("spotify_confidence")
        pandas = pytest.importorskip("pandas")
        rng = random.Random(4)
        sums = Sums()
        rows = []
        for n in range(8000):
            canary = rng.random() < 0.5
            value = rng.gauss(1.0 + 0.1 * canary, 0.5)
            rows.append((canary, value))
            sums.add_contrast(
                value, canary=canary, weight_ratio=0.5, stratum="", unit=None, step=0, block=n // 10, discount=0.0
            )
        frame = pandas.DataFrame(
            [
                {
                    "arm": name,
                    "sum": sum(value for arm, value in rows if arm is canary),
                    "squares": sum(value * value for arm, value in rows if arm is canary),
                    "n": sum(arm is canary for arm, _ in rows),
                }
                for name, canary in (("stable", False), ("canary", True))
            ]
        )
        test = confidence.ZTest(
            frame, numerator_column="sum", numerator_sum_squares_column="squares", denominator_column="n",
            categorical_group_columns="arm",
        )  # fmt: skip
        theirs = test.difference(level_1="stable", level_2="canary").iloc[0]
        error = (theirs["ci_upper"] - theirs["ci_lower"]) / 2.0 / 1.959964
        assert sums.estimate == pytest.approx(theirs["difference"], abs=0.1 * error)
        assert sqrt(sums.variance) == pytest.approx(error, rel=0.08)
