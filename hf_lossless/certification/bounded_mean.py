"""Gaffke's upper confidence bound of the mean of independent values with a known upper limit.

Let x_1..x_n be independent values of at most L, and w ~ Dirichlet(1, .., 1) random weights of n+1 rows:

    U = the confidence quantile of  w_1 x_1 + .. + w_n x_n + w_{n+1} L

This is Gaffke's bound. It assumes only the limit: neither normality nor a number of rows; its level is a conjecture
that has been checked for many families without a counterexample. For values 0 and 1 it is the exact bound of Clopper
and Pearson. Where no row changed it is still about 3/n, where a bootstrap would give 0.

With weights w_i = E_i / sum E of independent exponentials, P(sum w_i x_i >= c) = P(sum E_i (x_i - c) >= 0), whose
cumulant generating function is K(t) = -sum log(1 - t (x_i - c)). The saddlepoint t solves K'(t) = 0 and gives

    r = sign(t) sqrt(-2 K(t)),   u = t sqrt(K''(t)),   P = 1 - Phi(r + log(u / r) / r)

to within about a hundredth of P, without random numbers.

Sources: N. Gaffke, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative
variable", Math. Methods of Statistics 14, 2005. E. Learned-Miller & P. Thomas, "A new confidence interval for the mean
of a bounded random variable", arXiv 1905.06208, 2019 (the conjecture, comparisons). O. Barndorff-Nielsen, Biometrika
73, 1986 (r + log(u/r)/r).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]

_HALVINGS = 100
_NEAR_ZERO = 1e-3


def bounded_upper_bound(values: ArrayLike, confidence: float, limit: float) -> float:
    """Computes an upper confidence bound of the mean of which `values` are a sample.

    Args:
        values: Independent values [rows], none above the limit.
        confidence: 1 - alpha.
        limit: The largest possible value.

    Example:
        >>> round(bounded_upper_bound([0.0] * 99 + [1.0], 0.95, limit=1.0), 3)  # Clopper and Pearson: 0.0466
        0.047
    """
    sample = with_limit(values, limit)
    low, high = float(sample.min()), float(sample.max())
    if low == high:
        return low
    bound = optimize.brentq(
        lambda mean: chance_of_mean_above(sample, mean) - (1 - confidence), low, high, xtol=1e-12 * (high - low)
    )
    return float(bound)


def bounded_interval(values: ArrayLike, confidence: float, low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    """Computes a two-sided confidence interval of the mean of values in [low, high]: half the error on each side.

    Args:
        values: Independent values [rows], between `low` and `high`.
        confidence: 1 - alpha.
        low: The smallest possible value.
        high: The largest possible value.

    Returns:
        Lower and upper end of the interval.
    """
    one_sided = (1 + confidence) / 2
    below = -bounded_upper_bound(-np.asarray(values, np.float64), one_sided, -low)
    return below, bounded_upper_bound(values, one_sided, high)


def with_limit(values: ArrayLike, limit: float) -> Floats:
    """Appends the limit to the values, [rows + 1]."""
    return np.append(np.asarray(values, np.float64), limit)


def chance_of_mean_above(sample: Floats, mean: float) -> float:
    """Computes P(sum_i w_i x_i >= mean) for w ~ Dirichlet(1, .., 1), by the saddlepoint above.

    Args:
        sample: Values [rows].
        mean: The threshold of the weighted mean.

    Returns:
        The probability; exactly 1 or 0 where all values lie on one side of the threshold.
    """
    x = sample - mean
    if x.min() >= 0 or x.max() <= 0:
        return float(x.min() >= 0)
    x /= np.abs(x).max()
    t = _saddlepoint(x)
    y = 1 - t * x
    r = np.sign(t) * np.sqrt(max(2 * np.log(y).sum(), 0.0))
    u = t * np.sqrt(((x / y) ** 2).sum())  # K''(t) = sum (x / y)^2
    if abs(r) < _NEAR_ZERO:  # log(u / r) / r tends to a sixth of the standardised third cumulant
        return float(stats.norm.sf(r + (x**3).sum() / (x**2).sum() ** 1.5 / 3))
    return float(stats.norm.sf(r + np.log(u / r) / r))


def _saddlepoint(x: Floats) -> float:
    """Finds the root of K'(t) = sum x / (1 - t x).

    K' rises from -inf to inf between the poles 1/min x and 1/max x.
    """
    low, high = 1 / x.min(), 1 / x.max()
    for _ in range(_HALVINGS):
        t = (low + high) / 2
        if t in (low, high):
            break
        if (x / (1 - t * x)).sum() < 0:
            low = t
        else:
            high = t
    return float((low + high) / 2)
