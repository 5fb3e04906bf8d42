"""Selects and orders the plans for the certification rows, by their outputs on the selection rows.

The choice does not affect the validity of the certificate, since its rows have no part in it; it affects power. A walk
stops at its first failure, so a bad order or a hopeless plan ends it early.

**The probability of a plan to pass.** The tests ask whether the mean of a paired quantity d lies below zero (for the
loss d = l_c - (1 + t) l_o, for the metric the fall less its margin). On n certification rows the bound of that mean
will lie at about m' + z s / sqrt(n) + w / n, with w the distance of the worst row above the mean (see `skewed_mean`).
On N selection rows d has the mean m and the standard deviation s, and m' - m has the sampling error of both samples:

    P(pass) ~ Phi( -(m + z s / sqrt(n) + w / n) / (s sqrt(1/N + 1/n)) ),      the smaller of loss and metric

Where no answer changed, the standard deviation of the metric is unseen rather than zero: half a changed row is added.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hf_lossless.certification.comparison import Outputs

LIKELY = 0.5
"""Probability from which a plan is likely to pass."""

HOPELESS = 0.05
"""Probability below which a plan is not tested, to save its forward pass."""


CLOSE = 1.02
"""Factor between two ratios below which no plan is tried between them."""


class _Chanced(Protocol):
    @property
    def chance(self) -> float: ...


Chanced = TypeVar("Chanced", bound=_Chanced)


def chance_to_pass(
    original: Outputs,
    compressed: Outputs,
    num_rows: int,
    *,
    tolerance: float,
    metric_margin: float,
    confidence: float,
) -> float:
    """Estimates the probability that a plan passes both tests on `num_rows` certification rows; for ordering only.

    Args:
        original: The original's outputs on the selection rows.
        compressed: Outputs of the model under the plan on the same rows.
        num_rows: Number of certification rows.
        tolerance: As for `certify`.
        metric_margin: As for `certify`.
        confidence: As for `certify`.
    """
    original_losses, losses, original_scores, scores = (
        values.detach().cpu().double().numpy()
        for values in (original.losses, compressed.losses, original.scores, compressed.scores)
    )
    difference = losses - (1 + tolerance) * original_losses
    excess = original_scores - scores - metric_margin
    z = float(stats.norm.ppf(confidence))
    worst = float(difference.max() - difference.mean())
    loss = _chance(difference, num_rows, z, float(difference.var()), worst)
    metric = _chance(excess, num_rows, z, float(excess.var()) + 0.5 / len(excess), 0.0)
    return min(loss, metric)


def _chance(values: NDArray[np.float64], num_rows: int, z: float, variance: float, worst: float) -> float:
    bound = values.mean() + z * math.sqrt(variance / num_rows) + worst / num_rows
    scatter = math.sqrt(variance * (1 / len(values) + 1 / num_rows))
    if scatter == 0:
        return float(bound < 0)
    return float(stats.norm.cdf(-bound / scatter))


def next_ratio(chances: Mapping[float, float]) -> float | None:
    """Chooses the ratio to measure next: the middle of the two neighbours between which another plan gains most.

    A walk that fails at the smaller of two neighbours ends at the larger, although a plan between them might have
    passed. That happens in about `chance(larger) - chance(smaller)` of the walks, and costs up to the logarithm of
    their ratio; the product of the two is the gain. Where the probability falls nowhere (all are hopeless: superiority
    is demanded, or rows are few) the widest gap is halved.

    Args:
        chances: Probability to pass by ratio, for at least two ratios.

    Returns:
        The ratio; None where all neighbours are `CLOSE`.

    Example:
        >>> round(next_ratio({2.0: 1.0, 8.0: 0.0}), 3), round(next_ratio({2.0: 1.0, 4.0: 0.3, 8.0: 0.0}), 3)
        (4.0, 2.828)
    """
    gaps = [gap for gap in pairwise(sorted(chances)) if gap[1] / gap[0] > CLOSE]
    if not gaps:
        return None

    def gain(gap: tuple[float, float]) -> tuple[float, float]:
        low, high = gap
        width = math.log(high / low)
        return max(chances[low] - chances[high], 0.0) * width, width

    low, high = max(gaps, key=gain)
    return math.sqrt(low * high)


def order_of_proposals(measured: Sequence[Chanced]) -> list[Chanced]:
    """Orders the plans to be tested.

    The largest plan that is not hopeless comes first, so that a lucky selection cannot put a bold plan first. After it
    comes every plan that is likely to pass; of the others, those that are not hopeless and are followed by no smaller
    plan with a higher probability. Where all are hopeless, only the largest is tested, since its verdict gives the
    reason.

    Args:
        measured: Plans from the largest to the smallest.

    Example:
        >>> from types import SimpleNamespace
        >>> plans = [SimpleNamespace(chance=chance) for chance in (0.4, 0.9, 0.3, 0.6, 0.2, 0.01)]
        >>> [plan.chance for plan in order_of_proposals(plans)]
        [0.4, 0.9, 0.6, 0.2]
    """
    if all(plan.chance < HOPELESS for plan in measured):
        return [measured[0]]
    first, *others = [plan for plan in measured if plan.chance >= HOPELESS]
    return [first, *_worthwhile(others)]


def _worthwhile(plans: Sequence[Chanced]) -> Iterable[Chanced]:
    for index, plan in enumerate(plans):
        likeliest_behind = max((other.chance for other in plans[index + 1 :]), default=0.0)
        if plan.chance >= LIKELY or plan.chance > likeliest_behind:
            yield plan
