"""Rounds positions between levels to codes, to nearest or in the direction that the gradient asks for.

LLC Eq. 7: for a gradient vector p and a compression noise e, both taken as i.i.d. and independent, the first-order
change of the loss has the mean E<p, e> = k E[e] E[p]. Rounding to nearest makes E[e] = 0; rounding every weight down
makes E[e] = -step / 2, rounding up +step / 2. The direction whose sign opposes E[p] makes the mean change negative.

LLC Eq. 8 bounds the chance that the change is nevertheless not negative (Chebyshev):

    P(<p, e> >= 0) <= Var(e) Var(p) / (E[e] E[p])^2 + Var(e) / E[e]^2 + Var(p) / E[p]^2

The printed bound is that of one product e p, not of the sum over k of Eq. 7, whose bound is k times smaller. We use the
printed bound, since the smaller one assumes k independent weights, and weights of one layer are not: the same direction
for all of them shifts every output at once, which is a second-order cost that Eq. 7 does not see. One-sided rounding
has four times the squared error of rounding to nearest, so it is used only where the bound is below 1.

Confirmation on other rows is not enough. As a trial, the direction given by the mean gradients of both halves of the
calibration batches was one more candidate of the curvature theory, predicted by the smaller of the two first-order
terms plus its second-order term. The plan for a ResNet at a ratio of 8 was predicted to gain 0.066 nats; it lost 0.051
on the calibration rows themselves and 0.015 +- 0.007 on others, while without such candidates it changed by less than
0.0002: the gains of many layers from the same shift of the scores do not add up.
"""

import torch
from torch import Tensor

from hf_lossless.calibration.statistics import Moments
from hf_lossless.storage.plan import Rounding

_ONE_SIDED_NOISE_RATIO = 1 / 3
"""Var(e) / E[e]^2 of one-sided rounding: e is uniform on [0, step], (step^2 / 12) / (step / 2)^2."""

_ON_A_LEVEL = 2.0**-10
"""Positions within this distance of an integer count as integers. A float16 scale has a relative error of up to 2^-11,
and without the tolerance one-sided rounding would move a weight that lies on a level (a constant group) by a full
step."""


def round_positions(positions: Tensor, rounding: Rounding, scales: Tensor) -> Tensor:
    """Rounds positions in units of the step to whole codes.

    Args:
        positions: Positions `x / scale + zero`, any shape.
        rounding: "nearest" or "feedback", or the direction in which the *value* may move (by at most 2^-10 steps the
            other way). Where a scale is negative, a larger code is a smaller value, and codes round in the opposite
            direction.
        scales: Scales, broadcastable to `positions`.

    Returns:
        The codes, in the dtype of `positions`, not clamped.
    """
    if rounding in ("nearest", "feedback"):  # feedback has shifted the positions already
        return positions.round()
    code_goes_down = (scales >= 0) if rounding == "down" else (scales < 0)
    return torch.where(code_goes_down, (positions + _ON_A_LEVEL).floor(), (positions - _ON_A_LEVEL).ceil())


def wrong_way_bound(gradient: Moments) -> float:
    """Computes the Chebyshev bound of LLC Eq. 8 for one-sided rounding; above 1 it proves nothing.

    Args:
        gradient: Moments of dl/dw over the layer's weights.
    """
    if gradient.mean == 0:
        return float("inf")
    gradient_ratio = gradient.variance / gradient.mean / gradient.mean  # mean^2 may underflow
    return gradient_ratio * _ONE_SIDED_NOISE_RATIO + _ONE_SIDED_NOISE_RATIO + gradient_ratio


def aligned_rounding(gradient: Moments) -> Rounding:
    """Chooses LLC's rounding: against the gradient where Eq. 8 proves that this helps, else to nearest.

    Args:
        gradient: Moments of dl/dw over the layer's weights.
    """
    if wrong_way_bound(gradient) < 1:  # false for a gradient that overflowed to NaN
        return "down" if gradient.mean > 0 else "up"
    return "nearest"
