"""Step and error of quantised activations against samples that are truly quantised.

Tolerances: ACIQ takes the error as uniform inside the range, and what lies outside as clipped to the range's end, not
to the middle of its last bin. At few bits that is off by as much as TOLERANCE says.
"""

import math

import pytest
import torch
from torch import Tensor

from hf_lossless.calibration.statistics import InputStatistics, Moments
from hf_lossless.candidates.activations import ActivationNoise, activation_noise
from hf_lossless.candidates.clipping import gaussian_clip, laplace_clip

TOLERANCE = {1: 0.37, 2: 0.22, 3: 0.12, 4: 0.06, 5: 0.04, 6: 0.04, 7: 0.04, 8: 0.04}
BITS = [pytest.param(bits, id=f"{bits}bit") for bits in range(1, 9)]


def sample(density: str) -> Tensor:
    """The quantiles of a density: a sample without luck."""
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    centred = quantiles - 0.5
    if density == "laplace":
        return -centred.sign() * (1 - 2 * centred.abs()).log()
    return math.sqrt(2) * torch.erfinv(2 * centred) if density == "gauss" else 2 * centred


def statistics_of(values: Tensor) -> InputStatistics:
    return InputStatistics(
        values=Moments(values.mean().item(), values.var(correction=0).item(), values.numel()),
        mean_deviation=(values - values.mean()).abs().mean().item(),
        minimum=values.min().item(),
        maximum=values.max().item(),
        gradient=Moments(0.0, 0.0, values.numel()),
    )


def true_rms(values: Tensor, step: float, bits: int) -> float:
    """Of the error of 2^bits levels `step` apart around the mean, in the middle of their bins."""
    centred = values - values.mean()
    codes = torch.floor(centred / step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return ((codes + 0.5) * step - centred).square().mean().sqrt().item()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("density", ["laplace", "gauss", "uniform"])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.03, 2.0), (50.0, -7.0)], ids=["unit", "small", "large"])
def test_error_is_that_of_a_quantised_sample(density, bits, scale, offset):
    values = scale * sample(density) + offset
    noise = activation_noise(statistics_of(values), bits)
    assert noise.rms == pytest.approx(true_rms(values, noise.step, bits), rel=TOLERANCE[bits])


@pytest.mark.parametrize("bits", BITS)
def test_each_density_gets_its_own_range(bits):
    laplace, gauss = (activation_noise(statistics_of(sample(name)), bits).step for name in ("laplace", "gauss"))
    assert laplace == pytest.approx(laplace_clip(bits) / 2 ** (bits - 1), rel=1e-3)
    assert gauss == pytest.approx(min(gaussian_clip(bits), sample("gauss").max().item()) / 2 ** (bits - 1), rel=1e-3)


def test_the_range_never_exceeds_the_values():
    values = sample("uniform")
    for bits in range(3, 9):  # the Gaussian range, 2.15 sigma at 3 bits, is wider than +-1 = 1.73 sigma
        noise = activation_noise(statistics_of(values), bits)
        step = values.max().item() / 2 ** (bits - 1)
        assert noise.step == pytest.approx(step)
        assert noise.rms == pytest.approx(step / math.sqrt(12))


@pytest.mark.parametrize("density", ["laplace", "gauss", "uniform"])
def test_more_bits_have_less_noise(density):
    noises = [activation_noise(statistics_of(sample(density)), bits) for bits in range(1, 9)]
    assert [noise.step for noise in noises] == sorted((noise.step for noise in noises), reverse=True)
    assert [noise.rms for noise in noises] == sorted((noise.rms for noise in noises), reverse=True)


def test_constant_inputs_have_no_noise():
    constant = statistics_of(torch.full((10,), 0.1, dtype=torch.float64))
    assert activation_noise(constant, 4) == ActivationNoise(0.0, 0.0)
    rounded = InputStatistics(Moments(0.1, 1e-18, 10), 0.0, 0.1, 0.1, constant.gradient)  # of the variance's rounding
    assert activation_noise(rounded, 4) == ActivationNoise(0.0, 0.0)


def test_inputs_that_are_constant_in_every_call():
    """One number at a time: the mean deviation is taken call by call and is 0, the variance is not."""
    inputs = InputStatistics(Moments(0.0, 1.0, 100), 0.0, -3.0, 3.0, Moments(0.0, 0.0, 100))
    assert activation_noise(inputs, 3).step == pytest.approx(gaussian_clip(3) / 4)
