"""Rounds activations to the levels `scale * (code - zero)` of a uniform grid, in floating point.

    scale = (high - low) / (2^b - 1)        zero = round(-low / scale)        low <= 0 <= high
    q(x)  = scale * (clamp(round(x / scale) + zero, 0, 2^b - 1) - zero)

The zero point is a whole number, as integer hardware needs it, and zero is always a level, so that the zeros of a ReLU
or a padding stay exact (Jacob et al. 2018, arXiv 1712.05877, section 2.1). With a "static" range, low and high come
from calibration, one pair for a whole tensor; with a "dynamic" range they are those of the current input: of each
position for a linear layer, of each image for a convolution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lossless.storage.layers import LayerKind

DYNAMIC_AXES: dict[LayerKind, tuple[int, ...]] = {"linear": (-1,), "conv1d": (-1,), "conv2d": (-3, -2, -1)}
"""The axes of a layer's input that share a dynamic range; an embedding has no input to quantise."""


@dataclass(frozen=True, eq=False)
class StaticGrid:
    """Scale and zero point of a static grid, as they are stored.

    Attributes:
        scale: Distance between levels, float32 [1].
        zero: Code of zero, uint8 [1].
    """

    scale: Tensor
    zero: Tensor


def may_quantise_input(kind: LayerKind, tied: tuple[str, ...]) -> bool:
    """Returns whether a layer's input can be quantised: it is real-valued, and the layer is not tied.

    Modules that share a weight have different inputs, but only one of them is the layer's home; all of their inputs
    stay in floating point.
    """
    return kind in DYNAMIC_AXES and not tied


def scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Computes scale and zero point of a range, which is widened to include zero.

    Args:
        low: Least value, of any shape.
        high: Largest value, of the same shape.
        bits: Width of a code.

    Returns:
        Scale and zero, float32, of that shape. The range [0, 0] has scale 1.

    Example:
        >>> scale_and_zero(torch.tensor(-1.0), torch.tensor(2.0), bits=2)
        (tensor(1.), tensor(1.))
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    last_code = 2**bits - 1
    scale = high / last_code - low / last_code  # high - low may overflow float32
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (-low / scale).round_().clamp_(0, last_code)


def dynamic_range(values: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Computes the least and the largest value over `axes`, which are kept with length 1."""
    return values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)


def on_activation_grid(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Rounds values to a grid, q(x), in the dtype of `values`; values outside of the range are clamped, NaN stays NaN.

    Args:
        values: x, of any floating dtype; computed in float32.
        scale: float32, broadcast against `values`.
        zero: The same.
        bits: Width of a code.

    Example:
        >>> on_activation_grid(torch.tensor([-3.0, 0.4, 0.6, 9.0]), torch.tensor(1.0), torch.tensor(1.0), bits=2)
        tensor([-1.,  0.,  1.,  2.])
    """
    codes = (values.float() / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
    return codes.sub_(zero).mul_(scale).to(values.dtype)
