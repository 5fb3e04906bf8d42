"""Which plans to propose to the certification rows, and in what order, from what the selection rows say of them.

Whatever is decided here, the certificate stays right: its rows have no part in it. What is at stake is power. A walk
stops at its first failure, so a bad order or a plan that was hopeless ends it early.

**The chance of a plan to pass.** The tests ask whether the mean of a paired quantity d lies below zero (for the loss
d = l_c - (1 + t) l_o, for the metric the fall less its margin). On n certification rows the bound of that mean will lie
at about m' + z s / sqrt(n) + w / n, with w how far the worst row is above the mean (see `skewed_mean`). On N selection
rows d has the mean m and the spread s, and m' scatters around m by both samples:

    P(pass) ~ Phi( -(m + z s / sqrt(n) + w / n) / (s sqrt(1/N + 1/n)) ),      the smaller of loss and metric

Where no answer changed, the spread of the metric is not zero but unseen: half a changed row is added.
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
"""A plan is likely to pass from this chance on."""

HOPELESS = 0.05
"""A plan with a smaller chance is not tested: a forward pass for nothing."""


CLOSE = 1.02
"""Ratios that differ by less are not worth another plan."""


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
    """The chance that a plan passes both tests on `num_rows` certification rows; an estimate, for order only.

    Args:
        original: The original's outputs on the selection rows.
        compressed: Those of the model under the plan.
        num_rows: Certification rows.
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
    """The ratio to be measured next: in the middle of the two neighbours where another rung gains most.

    A walk that fails at the smaller of two neighbours ends at the larger, though a plan between might have passed, and
    may not go back to it. That happens in about `chance(larger) - chance(smaller)` of the walks, and costs up to the
    logarithm of their ratio; the product of the two is the gain. Where the chance falls nowhere (all are hopeless:
    superiority is demanded, or rows are few) the widest gap is halved.

    Args:
        chances: Chance to pass by ratio, for two ratios or more.

    Returns:
        A ratio; None where all neighbours are `CLOSE`.

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
    """The plans to be tested, in order.

    The largest that is not hopeless comes first: a lucky selection must not push a bold plan to the front. Behind it
    stands every plan that is likely to pass; of the others, those that are not hopeless and have no smaller one behind
    them that is likelier. Where all are hopeless, the largest alone is tested, for its verdict says why.

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
