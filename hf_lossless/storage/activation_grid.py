"""Grids of activations: a tensor to the levels `scale * (code - zero)`, and back, in floating point.

    scale = (high - low) / (2^b - 1)        zero = round(-low / scale)        low <= 0 <= high
    q(x)  = scale * (clamp(round(x / scale) + zero, 0, 2^b - 1) - zero)

The zero point is a whole number, as integer hardware wants it, and zero is always a level: what a ReLU or a padding
made zero stays zero. (Jacob et al. 2018, arXiv 1712.05877, section 2.1.) "Static" means that low and high were found
beforehand, one pair for a whole tensor; "dynamic" that they are those of the values at hand: of each position for a
linear layer, of each image for a convolution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lossless.storage.layers import LayerKind

DYNAMIC_AXES: dict[LayerKind, tuple[int, ...]] = {"linear": (-1,), "conv1d": (-1,), "conv2d": (-3, -2, -1)}
"""The axes of a layer's input that share a dynamic range; an embedding has no input to quantise."""


@dataclass(frozen=True, eq=False)
class StaticGrid:
    """Where the levels of a static grid lie, as it is stored.

    Attributes:
        scale: Distance between levels, float32 [1].
        zero: Code of zero, uint8 [1].
    """

    scale: Tensor
    zero: Tensor


def may_quantise_input(kind: LayerKind, tied: tuple[str, ...]) -> bool:
    """Whether a layer's input can be quantised: it is real-valued, and the layer is not tied.

    Modules that share a weight have inputs of their own, and only one of them is the layer's home; the inputs of all of
    them stay in floating point.
    """
    return kind in DYNAMIC_AXES and not tied


def scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid of a range, which is widened to include zero.

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
    scale = high / last_code - low / last_code  # the difference itself may leave float32
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (-low / scale).round_().clamp_(0, last_code)


def dynamic_range(values: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Least and largest value over `axes`, which are kept with length 1."""
    return values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)


def on_activation_grid(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """q(x), in the dtype of `values`; what lies outside the range goes to its end, NaN stays NaN.

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
