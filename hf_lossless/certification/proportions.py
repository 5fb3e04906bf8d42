"""Exact non-inferiority test of two paired proportions: how far the share of correct answers may have fallen.

Of n rows, `lost` went from right to wrong and `gained` from wrong to right, with probabilities p and q. The share of
correct answers falls by p - q, and the hypothesis to reject is p - q >= margin. Tango's score statistic standardises
the observed fall by its standard deviation under the hypothesis, not in the sample:

    z = (n margin - (lost - gained)) / sqrt(n (2 q0 + margin - margin^2))

with q0 the maximum-likelihood q under p = q + margin, the larger root of

    2 n q^2 + (2 n margin - lost (1 + margin) - gained (1 - margin)) q - gained margin (1 - margin) = 0

At the border of the hypothesis one parameter is free, the share p + q of rows that change. The p-value is the maximum
over all shares in a confidence interval (Berger & Boos):

    P = max over p + q in its 1 - gamma Clopper-Pearson interval of P(Z >= z) + gamma,   gamma = 1e-4

with P(Z >= z) summed over all outcomes, not approximated; so the level holds for any n. With a normal approximation z
would pass in up to 5.6 % at some hundred rows, and Wald's textbook interval in up to 20 % where few rows change. Margin
0 demands superiority; the test is then an unconditional sister of McNemar's.

Sources: T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
design", Statistics in Medicine 17, 1998. R. Berger & D. Boos, "P values maximized over a confidence set for the
nuisance parameter", JASA 89, 1994. A. Martin Andres & I. Herranz Tejedor, Comput. Stat. Data Anal. 47, 2004, and H.
Hsueh, J. Liu & J. Chen, Biometrics 57, 2001 (exact unconditional tests of this hypothesis).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

_GAMMA = 1e-4
_GRID = 32
_IMPOSSIBLE = 1e-15  # in place of probabilities of 0, for which scipy has no quantiles
_NEGLIGIBLE = 1e-9  # probability of the outcomes that are not summed; counted as rejections


def non_inferiority_p_value(lost: int, gained: int, num_rows: int, margin: float) -> float:
    """Computes the p-value against "the share of correct answers falls by `margin` or more".

    Args:
        lost: Rows that went from right to wrong.
        gained: Rows that went from wrong to right.
        num_rows: Number of all rows.
        margin: The margin, between -1 and 1.

    Example:
        >>> round(non_inferiority_p_value(lost=0, gained=0, num_rows=600, margin=0.005), 4)  # (1 - margin)^600 + gamma
        0.0495
    """
    observed = float(score(lost, gained, num_rows, margin))
    changed = stats.binomtest(lost + gained, num_rows).proportion_ci(1 - _GAMMA)
    least, most = max(changed.low, abs(margin)), max(changed.high, abs(margin))
    shares = np.linspace(np.sqrt(least), np.sqrt(most), _GRID)[:, None] ** 2  # finer where few rows change
    p, q = (np.maximum((shares + sign * margin) / 2, _IMPOSSIBLE) for sign in (1, -1))
    low = stats.binom.ppf(_NEGLIGIBLE, num_rows, p.min()).astype(int)
    high = stats.binom.isf(_NEGLIGIBLE, num_rows, p.max()).astype(int)
    outcomes = np.arange(low, high + 1)  # of `lost`, by column
    enough = _gained_enough(observed, outcomes, num_rows, margin)
    tails = stats.binom.sf(enough - 1, num_rows - outcomes, np.minimum(q / (1 - p), 1))
    chances = (stats.binom.pmf(outcomes, num_rows, p) * tails).sum(1) + 2 * _NEGLIGIBLE
    return float(min(chances.max() + _GAMMA, 1.0))


def fall_bound(lost: int, gained: int, num_rows: int, confidence: float) -> float:
    """Computes the upper confidence bound of the fall: the margin at which the p-value is 1 - confidence.

    Args:
        lost: Rows that went from right to wrong.
        gained: Rows that went from wrong to right.
        num_rows: Number of all rows.
        confidence: 1 - alpha.

    Returns:
        The bound, between -1 and 1.
    """
    observed = (lost - gained) / num_rows
    almost_one = 1 - 1e-9
    if observed >= almost_one:
        return 1.0
    bound = optimize.brentq(
        lambda margin: non_inferiority_p_value(lost, gained, num_rows, margin) - (1 - confidence),
        max(observed, -almost_one),
        almost_one,
        xtol=1e-5,
    )
    return float(bound)


def score(lost: ArrayLike, gained: ArrayLike, num_rows: int, margin: float) -> NDArray[np.float64]:
    """Computes Tango's z; large where the rows contradict the hypothesis.

    Without a changed row and with margin 0 it is 0.

    Args:
        lost: Rows that went from right to wrong.
        gained: Rows that went from wrong to right.
        num_rows: Number of all rows.
        margin: The margin, between -1 and 1.

    Returns:
        z, of the broadcast shape of `lost` and `gained`.
    """
    lost, gained = np.asarray(lost, np.float64), np.asarray(gained, np.float64)
    half_b = num_rows * margin - (lost * (1 + margin) + gained * (1 - margin)) / 2
    discriminant = half_b**2 + 2 * num_rows * gained * margin * (1 - margin)
    q0 = (-half_b + np.sqrt(np.maximum(discriminant, 0))) / (2 * num_rows)
    variance = num_rows * (2 * q0 + margin - margin**2)
    excess = num_rows * margin - (lost - gained)
    return np.where(variance > 0, excess / np.sqrt(np.where(variance > 0, variance, 1)), 0.0)


def _gained_enough(least: float, lost: NDArray[np.int64], num_rows: int, margin: float) -> NDArray[np.int64]:
    """Finds for each number lost the fewest gained with z >= least; one above the most possible where none is.

    For a fixed `lost`, z rises with the number gained, so that bisection finds it.
    """
    low, high = np.zeros_like(lost), num_rows - lost + 1
    while (low < high).any():
        gained = (low + high) // 2
        enough = score(lost, np.minimum(gained, num_rows - lost), num_rows, margin) >= least - 1e-9
        high = np.where(enough, np.minimum(high, gained), high)
        low = np.where(enough, low, np.minimum(gained + 1, high))
    return high
