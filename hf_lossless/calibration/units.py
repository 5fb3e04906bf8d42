"""Powers of two as units, which keep numbers of order one before they are squared.

float32 holds sizes from 1e-38 to 3e38, but the squares only of those from 1e-19 to 2e19. Inputs and gradients beyond
that are first divided by a power of two, which is exact, and the unit is kept beside the sums. Sizes near one have the
unit 1 and are not divided, so that ordinary models give the same bits as without units.
"""

import math

import torch
from torch import Tensor

_ORDINARY = 32
"""Binary orders of magnitude around 1 that have the unit 1: sizes from 2^-32 to 2^33."""

_LARGEST_POWER = 126
"""Bound on the exponent of a unit: the unit and its inverse are normal numbers of float32."""


def unit_of_size(size: float, ordinary: int = _ORDINARY) -> float:
    """Finds the power of two next below a size that is far from one; 1 for other sizes, 0 for 0.

    Args:
        size: A non-negative number.
        ordinary: Sizes within this many binary orders of magnitude of one have the unit 1.

    Example:
        >>> unit_of_size(0.001), unit_of_size(1.5 * 2.0**-40) == 2.0**-40, unit_of_size(0.0)
        (1.0, True, 0.0)
    """
    if size == 0:
        return 0.0
    power = math.frexp(size)[1] - 1
    return 1.0 if abs(power) <= ordinary or not math.isfinite(size) else 2.0**power


def unit_of(values: Tensor) -> float:
    """Finds the unit of the largest |value|: a power of two between 2^-126 and 2^126; 0 where all values are zero.

    Example:
        >>> unit_of(torch.tensor([3.0, -1e-30])), unit_of(torch.tensor([1e-30, 0.0])) == 2.0**-100
        (1.0, True)
    """
    if not values.numel():
        return 0.0
    unit = unit_of_size(max(abs(end.item()) for end in torch.aminmax(values.detach())))
    return min(max(unit, 2.0**-_LARGEST_POWER), 2.0**_LARGEST_POWER) if unit else 0.0


def in_unit(values: Tensor, unit: float) -> Tensor:
    """Divides values by their unit; returns the same tensor where the unit is 1 or 0."""
    return values if unit in (0.0, 1.0) else values / unit
