"""The exact test of paired proportions."""

import numpy as np
import pytest
from scipy import optimize, stats

from hf_lossless.certification.proportions import fall_bound, non_inferiority_p_value, score


@pytest.mark.parametrize(
    ("lost", "gained", "n", "margin"),
    [(3, 1, 50, 0.02), (0, 4, 50, 0.02), (0, 0, 30, 0.1), (2, 9, 40, -0.05), (5, 5, 30, 0.3)],
)
def test_the_score_has_the_most_likely_nuisance(lost: int, gained: int, n: int, margin: float) -> None:
    def minus_log_likelihood(q: float) -> float:
        chances = np.array([q + margin, q, 1 - 2 * q - margin])
        return -float((np.array([lost, gained, n - lost - gained]) * np.log(chances.clip(1e-300))).sum())

    limits = (max(0.0, -margin), (1 - margin) / 2)
    q0 = optimize.minimize_scalar(minus_log_likelihood, bounds=limits, options={"xatol": 1e-10}).x
    z = (n * margin - (lost - gained)) / np.sqrt(n * (2 * q0 + margin - margin**2))
    assert float(score(lost, gained, n, margin)) == pytest.approx(z, rel=1e-3)


def brute_p_value(lost: int, gained: int, n: int, margin: float) -> float:
    """The largest chance of a score as high, over the likely shares of changed rows, outcome by outcome."""
    outcomes = [(a, b) for a in range(n + 1) for b in range(n + 1 - a)]
    extreme = [score(a, b, n, margin) >= score(lost, gained, n, margin) - 1e-9 for a, b in outcomes]
    a, b = np.array([outcome for outcome, one in zip(outcomes, extreme, strict=True) if one]).T
    largest = 0.0
    changed = stats.binomtest(lost + gained, n).proportion_ci(1 - 1e-4)
    for share in np.linspace(max(changed.low, abs(margin)) + 1e-9, changed.high - 1e-9, 200):
        p, q = (share + margin) / 2, (share - margin) / 2
        chances = stats.multinomial.pmf(np.stack([a, b, n - a - b], axis=-1), n, [p, q, 1 - p - q])
        largest = max(largest, float(chances.sum()))
    return largest


@pytest.mark.parametrize("margin", [-0.05, 0.0, 0.05, 0.2])
@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 3), (1, 6), (3, 2)])
def test_the_p_value_is_the_largest_over_the_nuisance(lost: int, gained: int, margin: float) -> None:
    expected = brute_p_value(lost, gained, 20, margin) + 1e-4
    assert non_inferiority_p_value(lost, gained, 20, margin) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("n", "margin"), [(60, 0.02), (200, 0.005), (100, 0.0)])
def test_the_level_holds_exactly(n: int, margin: float) -> None:
    most = 25
    passes = np.array(
        [
            [non_inferiority_p_value(a, b, n, margin) <= 0.05 if a <= b + 2 else False for b in range(most)]
            for a in range(5)
        ]
    )
    for share in (margin + 0.001, margin + 0.01, 0.03, 0.05):
        p, q = (share + margin) / 2, (share - margin) / 2
        a, b = np.arange(5)[:, None], np.arange(most)[None, :]
        chances = stats.multinomial.pmf(np.stack(np.broadcast_arrays(a, b, n - a - b), axis=-1), n, [p, q, 1 - p - q])
        assert chances[passes].sum() <= 0.05


def test_the_bound_is_where_the_p_value_is_alpha() -> None:
    bound = fall_bound(20, 23, 1821, 0.95)
    assert non_inferiority_p_value(20, 23, 1821, bound) == pytest.approx(0.05, abs=1e-3)
    assert (20 - 23) / 1821 < bound < fall_bound(20, 23, 1821, 0.99) < fall_bound(23, 20, 1821, 0.99)


def test_the_bound_at_the_ends() -> None:
    assert fall_bound(10, 0, 10, 0.95) == 1.0
    assert fall_bound(0, 0, 600, 0.95) == pytest.approx(1 - 0.05 ** (1 / 600), rel=0.01)  # the rule of three
    assert -1 < fall_bound(0, 10, 10, 0.95) < 0


def test_margin_zero_demands_superiority() -> None:
    assert non_inferiority_p_value(0, 0, 100, 0.0) == 1.0
    assert non_inferiority_p_value(5, 5, 100, 0.0) > 0.3
    assert non_inferiority_p_value(0, 8, 100, 0.0) < 0.05
