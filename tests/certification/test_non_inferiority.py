"""The two tests: loss and metric."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from hf_lossless import ConfigurationError
from hf_lossless.certification.non_inferiority import loss_test, metric_test, required_rows
from hf_lossless.certification.proportions import non_inferiority_p_value
from hf_lossless.certification.skewed_mean import skewed_upper_bound

GENERATOR = np.random.default_rng(0)
LOSSES = GENERATOR.exponential(0.3, 2000)
NOISE = GENERATOR.normal(0, 0.02, 2000)


def test_the_loss_is_judged_by_the_paired_difference_from_the_tolerated_multiple() -> None:
    found = loss_test(LOSSES, LOSSES + NOISE, 0.01, 0.95)
    assert found.bound == pytest.approx(float(skewed_upper_bound(LOSSES + NOISE - 1.01 * LOSSES, 0.95)))
    assert found.passed and found.bound < 0 and found.p_value < 0.05


@pytest.mark.parametrize("tolerance", [-0.05, -0.01, 0.0, 0.01, 0.05])
def test_a_loss_that_changes_by_a_known_share(tolerance: float) -> None:
    for share in (tolerance - 0.02, tolerance + 0.02):
        assert loss_test(LOSSES, (1 + share) * LOSSES + NOISE, tolerance, 0.95).passed == (share < tolerance)


def test_a_model_is_no_better_than_itself() -> None:
    assert loss_test(LOSSES, LOSSES, 0.01, 0.95).passed
    assert not loss_test(LOSSES, LOSSES, 0.0, 0.95).passed
    right = np.ones(2000)
    assert metric_test(right, right, 0.005, 0.95).passed
    assert not metric_test(right, right, 0.0, 0.95).passed


def test_few_rows_never_pass() -> None:
    """What cannot be told from the original for lack of rows is not certified."""
    assert not loss_test(LOSSES[:20], (LOSSES + NOISE)[:20], 0.01, 0.95).passed
    found = metric_test(np.ones(100), np.ones(100), 0.005, 0.95)
    assert not found.passed and found.required_rows == 598  # log 0.05 / log 0.995
    scores = np.full(100, 0.5)
    assert not metric_test(scores, scores, 0.005, 0.95).passed


def test_right_and_wrong_have_the_exact_test() -> None:
    original = np.repeat([1, 1, 0, 0], [900, 10, 12, 78])
    compressed = np.repeat([1, 0, 1, 0], [900, 10, 12, 78])
    found = metric_test(original, compressed, 0.005, 0.95)
    assert found.p_value == non_inferiority_p_value(10, 12, 1000, 0.005)
    assert "paired proportions" in found.method


def test_scores_between_have_a_bound_with_a_limit() -> None:
    scores = GENERATOR.beta(5, 1, 3000)
    near = (scores + GENERATOR.normal(0, 0.01, 3000)).clip(0, 1)
    found = metric_test(scores, near, 0.02, 0.95)
    assert "Dirichlet" in found.method
    assert found.passed and (scores - near).mean() < found.bound < 0.02
    assert not metric_test(scores, (near - 0.05).clip(0, 1), 0.02, 0.95).passed


def test_the_level_of_the_loss_test_at_the_border() -> None:
    """Original and change are random, and the loss rises by exactly the tolerance; the original's mean is not known."""
    generator, wrong = np.random.default_rng(3), 0
    for _ in range(1000):
        original = generator.exponential(0.3, 400)
        compressed = original + generator.lognormal(-4, 1, 400) - np.exp(-3.5) + 0.003
        wrong += loss_test(original, compressed, 0.01, 0.95).passed
    assert stats.binomtest(wrong, 1000, 0.05, alternative="greater").pvalue > 0.01


def test_the_required_rows_give_the_power() -> None:
    generator = np.random.default_rng(4)
    original = generator.exponential(0.3, 20_000)
    first = loss_test(original, original + generator.normal(0, 0.05, 20_000), 0.01, 0.95)
    n = first.required_rows
    assert n is not None
    passed = []
    for _ in range(300):
        original = generator.exponential(0.3, n)
        passed.append(loss_test(original, original + generator.normal(0, 0.05, n), 0.01, 0.95).passed)
    assert 0.7 < np.mean(passed) < 0.9


def test_required_rows() -> None:
    spread = stats.norm.ppf(0.95) + stats.norm.ppf(0.8)
    assert required_rows(0.01, 0.1, 0.0, 0.95) == int(np.ceil((spread * 0.1 / 0.01) ** 2))
    rows = required_rows(0.01, 0.1, 2.0, 0.95)
    assert rows is not None
    assert spread * 0.1 / rows**0.5 + 2.0 / rows <= 0.01 < spread * 0.1 / (rows - 1) ** 0.5 + 2.0 / (rows - 1)
    assert required_rows(0.0, 0.1, 0.0, 0.95) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_test(LOSSES, LOSSES, 0.01, 1.0), r"confidence=1\.0 is not between 0 and 1\. Give say 0\.95"),
        (lambda: metric_test(LOSSES, LOSSES, 0.01, 0), r"confidence=0 is not between 0 and 1"),
        (lambda: loss_test(LOSSES, LOSSES, 0.01, float("nan")), r"confidence=nan is not between 0 and 1"),
        (lambda: loss_test(LOSSES, LOSSES, float("inf"), 0.95), r"tolerance=inf is not a finite number\. Give a share"),
        (lambda: metric_test(LOSSES, LOSSES, 1, 0.95), r"metric_margin=1 is not between -1 and 1\. .* point is 0\.005"),
    ],
    ids=["confidence-1", "confidence-0", "confidence-nan", "tolerance-inf", "margin-in-points"],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()
