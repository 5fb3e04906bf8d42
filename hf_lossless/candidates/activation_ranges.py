"""Static ranges of activations: which are tried, and what error each leaves, value by value.

Tried are the whole range that was seen, its two ends drawn in independently by the powers of `SHRINKAGE`, and the two
ranges that ACIQ would clip to (see `clipping`), `E x +- alpha`, for a Laplace and for a Gauss density. After a ReLU or
a GELU one end of these reaches beyond what was seen, and is cut off there.

ACIQ's ranges by themselves do not go far enough where a few values are a hundred times as large as the others: with
all inputs of MiniLM at 8, 6 and 4 bits the divergence on 512 other rows was 0.0036, 0.095 and 0.120 with the whole
range and ACIQ's to choose from, and 0.0025, 0.020 and 0.085 with all that are tried here. On a ViT it made no
difference.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_lossless.calibration.activations import ActivationStatistics, bin_edges
from hf_lossless.calibration.statistics import InputStatistics
from hf_lossless.candidates.clipping import gaussian_clip, laplace_clip
from hf_lossless.storage.activation_grid import StaticGrid, scale_and_zero

SHRINKAGE = tuple(0.8**power for power in range(15))
"""What the ends of the whole range are multiplied by; the last is 0.04."""

_NARROW = 1e-6
"""An interval of so small a part of a step counts as one value: the difference of its ends' integrals would cancel."""


def best_static_grid(
    inputs: InputStatistics, activations: ActivationStatistics, bits: int
) -> tuple[StaticGrid, Tensor]:
    """The grid with the least weighted squared error among those that are tried.

    A value's error weighs half by the curvature of the loss there and half as much as any other's: by the curvature
    alone, ranges would be taken that clip what just these calibration rows do not react to. With all inputs at 4 bits
    they caused twice the divergence on other rows: 0.111 against 0.051 on MiniLM, 0.0093 against 0.0054 on a ViT.

    Args:
        inputs: The layer input's distribution.
        activations: The histogram of the same values.
        bits: Width, 2 to 8.

    Returns:
        The grid, and the mean of e^2 over each bin, float64 [bins]; 0 where there are no values.
    """
    low, high = torch.tensor(list(_ranges(inputs, bits))).unbind(1)
    scales, zeros = scale_and_zero(low, high, bits)
    seen = activations.counts > 0
    counts, sensitivity = activations.counts[seen], activations.sensitivity[seen]
    weights = sensitivity + counts * (sensitivity.sum() / counts.sum())
    lower, upper = (edge[seen].clamp(inputs.minimum, inputs.maximum) for edge in bin_edges())
    errors = squared_errors(lower, upper, scales[:, None], zeros[:, None], bits)
    best = int((errors @ weights).argmin())
    error_of_bin = torch.zeros_like(activations.counts)
    error_of_bin[seen] = errors[best]
    return StaticGrid(scales[best : best + 1], zeros[best : best + 1].to(torch.uint8)), error_of_bin


def _ranges(inputs: InputStatistics, bits: int) -> Iterator[tuple[float, float]]:
    """Pairs (low, high), the whole range first."""
    for low_share, high_share in itertools.product(SHRINKAGE, repeat=2):
        yield inputs.minimum * low_share, inputs.maximum * high_share
    mean, deviation = inputs.values.mean, math.sqrt(inputs.values.variance)
    for reach in (laplace_clip(bits) * inputs.mean_deviation, gaussian_clip(bits) * deviation):
        yield max(mean - reach, inputs.minimum), min(mean + reach, inputs.maximum)


def squared_errors(lower: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Mean of `e^2` over intervals, were values spread evenly in them.

    In units of the scale, and with c(u) the level that u goes to, the integral of the squared error is, for values
    inside the range and beyond it,

        int_0^u (v - c(v))^2 dv  =  c(u) / 12 + (u - c(u))^3 / 3

    Args:
        lower: Lower ends, float64 [intervals].
        upper: Upper ends, float64 [intervals].
        scale: Scales of some grids, [grids, 1].
        zero: Their zeros, [grids, 1].
        bits: Width of a code.

    Returns:
        float64 [grids, intervals].

    Example:
        >>> ends = torch.tensor([0.0]).double(), torch.tensor([5.0]).double()  # five whole steps inside the range
        >>> squared_errors(*ends, torch.tensor([[1.0]]), torch.tensor([[2.0]]), bits=4) * 12
        tensor([[1.]], dtype=torch.float64)
    """
    scale, zero = scale.double(), zero.double()
    lowest, highest = -zero, 2**bits - 1 - zero

    def level(position: Tensor) -> Tensor:
        return position.round().clamp(lowest, highest)

    def integral(position: Tensor) -> Tensor:
        return level(position) / 12 + (position - level(position)) ** 3 / 3

    start, end = lower / scale, upper / scale
    middle = (start + end) / 2
    at_once = (middle - level(middle)) ** 2
    return scale**2 * torch.where(end - start > _NARROW, (integral(end) - integral(start)) / (end - start), at_once)
