"""Upper bounds of a mean: the skewness-corrected one, and the one for values with a limit."""

import numpy as np
import pytest
from scipy import optimize, stats

from hf_lossless.certification.bounded_mean import (
    bounded_interval,
    bounded_upper_bound,
    chance_of_mean_above,
    with_limit,
)
from hf_lossless.certification.skewed_mean import skewed_interval, skewed_p_value, skewed_upper_bound

GENERATOR = np.random.default_rng(0)
SKEWED = GENERATOR.lognormal(0, 1, 80)


def hall(values: np.ndarray, mean: float) -> float:
    """Hall's transformed t of the values with the worst row twice, term by term."""
    values = np.append(values, values.max())
    n, g = len(values), stats.skew(values)
    t = (values.mean() - mean) / stats.sem(values)
    return t + g * t**2 / (3 * n**0.5) + g**2 * t**3 / (27 * n) + g / (6 * n**0.5)


@pytest.mark.parametrize("values", [SKEWED, -SKEWED, SKEWED[:2], SKEWED - 50], ids=["right", "left", "two", "moved"])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_skewed_bound_solves_halls_equation(values: np.ndarray, confidence: float) -> None:
    bound = float(skewed_upper_bound(values, confidence))
    assert hall(values, bound) == pytest.approx(stats.norm.ppf(1 - confidence), abs=1e-9)
    assert float(skewed_p_value(values - bound)) == pytest.approx(1 - confidence)


def test_without_skewness_it_is_the_t_statistic() -> None:
    values = np.array([-1.0, 1.0, 1.0, -1.0, -1.0])  # with the worst row twice, symmetric
    assert skewed_upper_bound(values, 0.95) == pytest.approx(stats.norm.ppf(0.95) * 5**-0.5)
    barely = values + np.array([1e-7, 0, 0, 0, 0])  # no jump between the two forms of the inverse
    assert skewed_upper_bound(barely, 0.95) == pytest.approx(float(skewed_upper_bound(values, 0.95)), abs=1e-6)


def test_many_samples_at_once() -> None:
    many = GENERATOR.exponential(size=(3, 2, 40))
    bounds, p_values = skewed_upper_bound(many, 0.9), skewed_p_value(many - 1)
    assert bounds.shape == p_values.shape == (3, 2)
    assert bounds[2, 1] == pytest.approx(float(skewed_upper_bound(many[2, 1], 0.9)))
    assert ((p_values < 0.1) == (bounds < 1)).all()


def test_the_bounds_move_and_stretch_with_the_values() -> None:
    bound = float(skewed_upper_bound(SKEWED, 0.95))
    assert skewed_upper_bound(3 * SKEWED + 2, 0.95) == pytest.approx(3 * bound + 2)
    assert bounded_upper_bound(3 * SKEWED + 2, 0.95, 302.0) == pytest.approx(
        3 * bounded_upper_bound(SKEWED, 0.95, 100.0) + 2
    )


def test_constant_values() -> None:
    assert skewed_upper_bound([-0.5] * 5, 0.95) == bounded_upper_bound([-0.5] * 5, 0.95, -0.5) == -0.5
    assert [float(skewed_p_value([value] * 5)) for value in (-1.0, 0.0, 1.0)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("n", [300, 1000])
@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_the_level_holds_for_heavy_right_tails_where_students_does_not(n: int, sigma: float) -> None:
    samples = np.random.default_rng(5).lognormal(0, sigma, (4000, n)) - np.exp(sigma**2 / 2)
    wrong = int((skewed_p_value(samples) < 0.05).sum())
    assert stats.binomtest(wrong, 4000, 0.05, alternative="greater").pvalue > 0.01
    student = stats.ttest_1samp(samples, 0, axis=1, alternative="less").pvalue
    assert (student < 0.05).mean() > 0.06


@pytest.mark.parametrize(("ones", "n"), [(0, 50), (1, 100), (5, 100), (50, 100), (99, 100), (100, 100)])
def test_the_bounded_bound_of_zeros_and_ones_is_clopper_and_pearsons(ones: int, n: int) -> None:
    values = np.repeat([1.0, 0.0], [ones, n - ones])
    exact = stats.binomtest(ones, n, alternative="less").proportion_ci(0.95).high
    assert bounded_upper_bound(values, 0.95, 1.0) == pytest.approx(exact, rel=0.01)
    both = stats.binomtest(ones, n).proportion_ci(0.95)
    assert bounded_interval(values, 0.95) == pytest.approx((both.low, both.high), rel=0.05)


def test_the_saddlepoint_against_random_weights() -> None:
    sample = with_limit(SKEWED[:25], 20.0)
    means = np.random.default_rng(1).dirichlet(np.ones(26), 200_000) @ sample
    for chance in (0.9, 0.5, 0.2, 0.05, 0.01):
        assert chance_of_mean_above(sample, float(np.quantile(means, 1 - chance))) == pytest.approx(chance, rel=0.03)
    middle = optimize.brentq(lambda mean: (sample - mean).sum(), sample.min(), sample.max())  # where r = 0
    around = [chance_of_mean_above(sample, middle + step) for step in (-1e-3, 0.0, 1e-3)]
    assert around[0] > around[1] > around[2] and around[0] - around[2] < 0.01


def test_the_bounded_level_holds_where_few_rows_change() -> None:
    generator = np.random.default_rng(2)
    samples = -generator.beta(0.5, 0.5, (200, 200)) * (generator.random((200, 200)) < 0.02)  # mean -0.01, at most 0
    wrong = sum(bounded_upper_bound(sample, 0.95, 1.0) < -0.01 for sample in samples)
    assert stats.binomtest(wrong, 200, 0.05, alternative="greater").pvalue > 0.01


def test_intervals_hold_the_mean_between_two_one_sided_bounds() -> None:
    low, high = skewed_interval(SKEWED, 0.9)
    assert low < SKEWED.mean() < high == float(skewed_upper_bound(SKEWED, 0.95))
