"""The ranges of ACIQ against a numerical search for the least mean squared error, and against the paper's numbers."""

import math

import pytest
import torch
from scipy import integrate, stats
from scipy.optimize import minimize_scalar

from hf_lossless.candidates.clipping import gaussian_clip, laplace_clip

BITS = [pytest.param(bits, id=f"{bits}bit") for bits in range(1, 9)]
DENSITIES = pytest.mark.parametrize(
    ("clip", "density"), [(laplace_clip, stats.laplace), (gaussian_clip, stats.norm)], ids=["laplace", "gauss"]
)


def clipping_error(alpha: float, bits: int, density: stats.rv_continuous) -> float:
    """2 int_alpha^inf (x - alpha)^2 f(x) dx + alpha^2 / (3 * 4^bits), the integral by quadrature."""
    tail, _ = integrate.quad(lambda x: (x - alpha) ** 2 * density.pdf(x), alpha, alpha + 60)
    return 2 * tail + alpha**2 / (3 * 4.0**bits)


@pytest.mark.parametrize("bits", BITS)
@DENSITIES
def test_clip_minimises_the_error(clip, density, bits):
    found = minimize_scalar(
        clipping_error, bounds=(0.05, 20), args=(bits, density), method="bounded", options={"xatol": 1e-7}
    )
    assert clip(bits) == pytest.approx(found.x, rel=1e-3)
    assert clipping_error(clip(bits), bits, density) <= found.fun * (1 + 1e-9)


@pytest.mark.parametrize(
    ("clip", "published"),
    [(gaussian_clip, {2: 1.71, 3: 2.15, 4: 2.55}), (laplace_clip, {2: 2.83, 3: 3.89, 4: 5.03})],
    ids=["gauss", "laplace"],
)
def test_published_values(clip, published):
    assert {bits: clip(bits) for bits in published} == pytest.approx(published, abs=0.01)  # some are cut, not rounded


@DENSITIES
def test_more_bits_clip_less(clip, density):
    clips = [clip(bits) for bits in range(1, 9)]
    assert clips == sorted(clips)
    errors = [clipping_error(alpha, bits, density) for bits, alpha in enumerate(clips, start=1)]
    assert errors == sorted(errors, reverse=True)


def test_laplace_satisfies_the_stationarity_condition():
    """d MSE / d alpha = 0: alpha = 3 * 4^M * exp(-alpha), in units of b."""
    for bits in range(1, 9):
        assert laplace_clip(bits) == pytest.approx(3 * 4.0**bits * math.exp(-laplace_clip(bits)), rel=1e-9)


@pytest.mark.parametrize("bits", [pytest.param(bits, id=f"{bits}bit") for bits in (3, 4, 6)])
@DENSITIES
def test_clip_is_near_the_best_for_a_real_quantiser(clip, density, bits):
    """The formula takes rounding errors as uniform; a true quantiser is up to a quarter worse, at its best too."""
    sample = torch.tensor(density.ppf((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000))

    def error(alpha: float) -> float:
        step = 2 * alpha / 2**bits
        codes = torch.floor(sample / step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return ((codes + 0.5) * step - sample).square().mean().item()

    least = min(error(alpha) for alpha in torch.linspace(0.5, 12, 231).tolist())
    assert error(clip(bits)) <= 1.06 * least
    assert 0.95 <= error(clip(bits)) / clipping_error(clip(bits), bits, density) <= 1.25
