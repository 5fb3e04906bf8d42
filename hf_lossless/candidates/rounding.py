"""How a real position between two levels becomes a code, and which direction the gradient asks for.

LLC Eq. 7: for a gradient vector p and a compression noise e, both taken as i.i.d. and independent, the first-order
change of the loss has the mean E<p, e> = k E[e] E[p]. Rounding to nearest makes E[e] = 0; rounding every weight down
makes E[e] = -step / 2, rounding up +step / 2. The direction whose sign opposes E[p] makes the mean change negative.

LLC Eq. 8 bounds the chance that the change is nevertheless not negative (Chebyshev):

    P(<p, e> >= 0) <= Var(e) Var(p) / (E[e] E[p])^2 + Var(e) / E[e]^2 + Var(p) / E[p]^2

The printed bound is that of one product e p, not of the sum over k of Eq. 7, whose bound is k times smaller. We take it
as printed, for the smaller one rests on k independent weights, and weights of one layer are not: the same direction
for all of them shifts every output at once, which is a second-order cost that Eq. 7 does not see. One-sided rounding
has four times the squared error of rounding to nearest, so it is used only where the bound proves something.

Confirmation by other rows proves too little. With the direction that the mean gradients of both halves of the
calibration batches ask for as one more candidate of the curvature theory, credited with the smaller of the two first
orders and charged with its second order, the plan for a ResNet at a ratio of 8 was predicted to gain 0.066 nats; it
lost 0.051 on the calibration rows themselves and 0.015 +- 0.007 on others, where without such candidates it neither
gained nor lost 0.0002: what many layers gain by one and the same shift of the scores does not add up.
"""

import torch
from torch import Tensor

from hf_lossless.calibration.statistics import Moments
from hf_lossless.storage.plan import Rounding

_ONE_SIDED_NOISE_RATIO = 1 / 3
"""Var(e) / E[e]^2 of one-sided rounding: e is uniform on [0, step], (step^2 / 12) / (step / 2)^2."""

_ON_A_LEVEL = 2.0**-10
"""Positions this near to a whole number count as whole. A scale in float16 is off by up to 2^-11 of itself, and without
the tolerance one-sided rounding would move a weight that a level was made for (a constant group) by a whole step."""


def round_positions(positions: Tensor, rounding: Rounding, scales: Tensor) -> Tensor:
    """Positions in units of the step, to whole codes.

    Args:
        positions: `x / scale + zero`, any shape.
        rounding: "nearest" or "feedback", or the direction in which the *value* may move (the other way by 2^-10 steps
            at most). Where a scale is negative a larger code is a smaller value, and the code's direction turns round.
        scales: Broadcastable to `positions`.

    Returns:
        Whole numbers, in the dtype of `positions`, not clamped.
    """
    if rounding in ("nearest", "feedback"):  # feedback rounds to nearest what the errors before have moved
        return positions.round()
    code_goes_down = (scales >= 0) if rounding == "down" else (scales < 0)
    return torch.where(code_goes_down, (positions + _ON_A_LEVEL).floor(), (positions - _ON_A_LEVEL).ceil())


def wrong_way_bound(gradient: Moments) -> float:
    """Chebyshev bound of LLC Eq. 8 for one-sided rounding; above 1 it says nothing.

    Args:
        gradient: Moments of dl/dw over the layer's weights.
    """
    if gradient.mean == 0:
        return float("inf")
    gradient_ratio = gradient.variance / gradient.mean / gradient.mean  # mean^2 may underflow
    return gradient_ratio * _ONE_SIDED_NOISE_RATIO + _ONE_SIDED_NOISE_RATIO + gradient_ratio


def aligned_rounding(gradient: Moments) -> Rounding:
    """The rounding that LLC asks for: against the gradient where Eq. 8 proves that it helps, else to nearest."""
    if wrong_way_bound(gradient) < 1:  # false for a gradient that overflowed to NaN
        return "down" if gradient.mean > 0 else "up"
    return "nearest"
