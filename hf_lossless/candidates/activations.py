"""Step and error of quantised activations at a width, from the distribution of the inputs.

The range is that of ACIQ (see `clipping`) for a Laplace or a Gaussian density, whichever the ratio of standard
deviation to mean deviation is nearer to: sqrt(2) for Laplace, sqrt(pi / 2) for Gauss.
"""

import math
from dataclasses import dataclass

from scipy.stats import norm

from hf_lossless.calibration.statistics import InputStatistics
from hf_lossless.candidates.clipping import gaussian_clip, laplace_clip

_LAPLACE_RATIO = math.sqrt(2)
_GAUSS_RATIO = math.sqrt(math.pi / 2)


@dataclass(frozen=True)
class ActivationNoise:
    """The step and the error of a layer's input quantised at some width.

    Attributes:
        step: Distance between levels, the `scale_input` of LLC Algorithm 1.
        rms: ||e|| / sqrt(size(e)) of the quantisation error e.
    """

    step: float
    rms: float


def activation_noise(inputs: InputStatistics, bits: int) -> ActivationNoise:
    """Computes step and error of `bits`-bit activations: `rms^2 = clipped tail + step^2 / 12`.

    Args:
        inputs: The layer input's distribution.
        bits: Width, 1 to 8.
    """
    deviation = math.sqrt(inputs.values.variance)
    if inputs.minimum == inputs.maximum or deviation == 0:
        return ActivationNoise(0.0, 0.0)
    # The mean deviation is 0 where inputs are constant in each call but differ between calls.
    if inputs.mean_deviation and deviation / inputs.mean_deviation > (_LAPLACE_RATIO + _GAUSS_RATIO) / 2:
        scale, clip = inputs.mean_deviation, laplace_clip(bits)
        tail = 2 * scale**2 * math.exp(-clip)
    else:
        scale, clip = deviation, gaussian_clip(bits)
        tail = 2 * scale**2 * float((1 + clip**2) * norm.sf(clip) - clip * norm.pdf(clip))
    reach = max(inputs.maximum - inputs.values.mean, inputs.values.mean - inputs.minimum)
    if clip * scale >= reach:  # the range covers all inputs: no tail is clipped
        clip, tail = reach / scale, 0.0
    step = clip * scale / 2 ** (bits - 1)
    return ActivationNoise(step, math.sqrt(tail + step**2 / 12))
