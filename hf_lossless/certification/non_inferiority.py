"""The two tests of a compressed model: its loss and its metric are not worse by more than a margin.

Non-inferiority reverses the usual test. The null hypothesis is that the model *is* worse, and only data can reject it:
with too few rows, or rows that vary too much, it is not rejected. Nothing is ever certified for lack of power.

**Loss.** The tolerance t is relative: E[l_c] <= (1 + t) E[l_o], with means over the population of rows. Both means are
unknown, and taking (1 + t) times the original's sample mean as known would ignore its sampling error. Row by row

    d = l_c - (1 + t) l_o,      the loss is within the tolerance exactly when  E[d] < 0

so that one mean is tested, which includes the variation of both. The bound is that of `skewed_mean`. A tolerance t <= 0
is allowed: the loss then has to fall by more than -t of the original's.

**Metric.** The mean score may fall by less than the margin. Scores that are all 0 or 1 have an exact test
(`proportions`); others lie in [0, 1], their falls in [-1, 1], and `bounded_mean` takes 1 as the limit.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from hf_lossless.certification.bounded_mean import bounded_upper_bound, chance_of_mean_above, with_limit
from hf_lossless.certification.proportions import fall_bound, non_inferiority_p_value
from hf_lossless.certification.skewed_mean import skewed_p_value, skewed_upper_bound
from hf_lossless.errors import ConfigurationError

POWER = 0.8
"""The probability to pass that `required_rows` aims at, for a model of no true difference."""


@dataclass(frozen=True)
class NonInferiority:
    """The outcome of a test of non-inferiority.

    Attributes:
        method: The test's name.
        p_value: P-value against the hypothesis that the model is worse by the margin or more.
        bound: Upper confidence bound of the tested quantity: of E[d] for the loss, of the fall for the metric.
        passed: Whether the p-value is below alpha.
        required_rows: Rows with which a model of no true difference and the same variance passes with probability
            `POWER`; None where superiority is demanded, for which no number is enough.
    """

    method: str
    p_value: float
    bound: float
    passed: bool
    required_rows: int | None


def check_confidence(confidence: float) -> None:
    """Raises an error for a confidence that is not strictly between 0 and 1.

    Args:
        confidence: 1 - alpha.

    Raises:
        ConfigurationError: The confidence is out of range.
    """
    if not 0 < confidence < 1:
        raise ConfigurationError(f"confidence={confidence!r} is not between 0 and 1. Give say 0.95.")


def loss_test(original: ArrayLike, compressed: ArrayLike, tolerance: float, confidence: float) -> NonInferiority:
    """Tests whether the mean loss stays within a relative tolerance of the original's.

    Args:
        original: Losses of the original [rows].
        compressed: Losses of the compressed model on the same rows [rows].
        tolerance: Share of the original's mean loss by which it may rise; 0 or below: it has to fall.
        confidence: 1 - alpha.

    Raises:
        ConfigurationError: The tolerance is not finite, or the confidence is out of range.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> losses = generator.exponential(0.3, 5000)
        >>> noise = generator.normal(0, 0.01, 5000)
        >>> loss_test(losses, losses + noise, tolerance=0.01, confidence=0.95).passed
        True
        >>> loss_test(losses, losses + noise, tolerance=0.0, confidence=0.95).passed
        False
    """
    check_confidence(confidence)
    if not math.isfinite(tolerance):
        raise ConfigurationError(f"tolerance={tolerance!r} is not a finite number. Give a share of the loss, say 0.01.")
    original = np.asarray(original, np.float64)
    difference = np.asarray(compressed, np.float64) - (1 + tolerance) * original
    p_value = float(skewed_p_value(difference))
    return NonInferiority(
        method="skewness-corrected t, worst row twice (Hall 1992)",
        p_value=p_value,
        bound=float(skewed_upper_bound(difference, confidence)),
        passed=p_value < 1 - confidence,
        required_rows=required_rows(
            margin=tolerance * original.mean(),
            standard_deviation=float(difference.std()),
            worst=float(difference.max() - difference.mean()),
            confidence=confidence,
        ),
    )


def metric_test(original: ArrayLike, compressed: ArrayLike, margin: float, confidence: float) -> NonInferiority:
    """Tests whether the mean score falls by less than a margin.

    Args:
        original: Scores of the original [rows], between 0 and 1.
        compressed: Scores of the compressed model on the same rows [rows].
        margin: How far the mean may fall; 0 or below: it has to rise.
        confidence: 1 - alpha.

    Raises:
        ConfigurationError: The margin is not between -1 and 1, or the confidence is out of range.
    """
    check_confidence(confidence)
    if not -1 < margin < 1:
        raise ConfigurationError(
            f"metric_margin={margin!r} is not between -1 and 1. Metrics run from 0 to 1: half a point is 0.005."
        )
    original, compressed = np.asarray(original, np.float64), np.asarray(compressed, np.float64)
    fall = original - compressed
    if np.isin(np.concatenate([original, compressed]), (0, 1)).all():
        method = "exact score test of paired proportions (Tango 1998, Berger & Boos 1994)"
        lost, gained, worst = int((fall > 0).sum()), int((fall < 0).sum()), 0.0
        p_value = non_inferiority_p_value(lost, gained, len(fall), margin)
        bound = fall_bound(lost, gained, len(fall), confidence)
    else:
        method = "Dirichlet-weighted mean of scores between 0 and 1 (Gaffke 2005)"
        p_value = chance_of_mean_above(with_limit(fall, 1.0), margin)
        bound, worst = bounded_upper_bound(fall, confidence, 1.0), 1.0
    needed = required_rows(margin, float(fall.std()), worst, confidence)
    return NonInferiority(
        method=method,
        p_value=p_value,
        bound=bound,
        passed=p_value < 1 - confidence,
        required_rows=None if needed is None else max(needed, _rule_of_three(margin, confidence)),
    )


def _rule_of_three(margin: float, confidence: float) -> int:
    """Computes how many rows without a loss of 1 show its mean to be below the margin: about 3 / margin."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-margin))


def required_rows(
    margin: float, standard_deviation: float, worst: float, confidence: float, power: float = POWER
) -> int | None:
    """Computes how many rows the given margin needs.

    A model of no true difference passes with probability `power` once the margin covers both quantiles of the mean's
    sampling error and the added row that represents the unseen tail:

        margin = (z_confidence + z_power) sd / sqrt(n) + worst / n

    Args:
        margin: How much worse the model may be, in the units of the differences.
        standard_deviation: Standard deviation of the tested difference of a row.
        worst: How far the added row lies above the mean; 0 for none.
        confidence: 1 - alpha.
        power: Probability to pass.

    Returns:
        The number of rows; None where the margin is zero or below.

    Example:
        >>> required_rows(0.003, 0.02, 0.1, 0.95)
        339
    """
    if margin <= 0:
        return None
    quantiles = float(stats.norm.ppf(confidence) + stats.norm.ppf(power)) * standard_deviation
    # the root sqrt(n) of margin n - quantiles sqrt(n) - worst
    root = (quantiles + math.sqrt(quantiles**2 + 4 * margin * worst)) / (2 * margin)
    return max(math.ceil(root**2), 2)
