"""Directions of rounding, and the probability bound of LLC Eq. 8 against a Monte-Carlo estimate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lossless.calibration.statistics import Moments
from hf_lossless.candidates.rounding import aligned_rounding, round_positions, wrong_way_bound

TOLERANCE = 2.0**-10
NO_LIMIT = settings(deadline=None)


@pytest.mark.parametrize(
    ("rounding", "scale", "expected"),
    [
        ("nearest", 1.0, [0, 0, 1, 2, -2, -1]),
        ("nearest", -1.0, [0, 0, 1, 2, -2, -1]),
        ("down", 1.0, [0, 0, 0, 1, -2, -1]),
        ("down", -1.0, [0, 1, 1, 2, -1, -1]),  # a smaller value is a larger code
        ("up", 1.0, [0, 1, 1, 2, -1, -1]),
        ("up", -1.0, [0, 0, 0, 1, -2, -1]),
    ],
)
def test_directions(rounding, scale, expected):
    positions = torch.tensor([0.0, 0.3, 0.7, 1.6, -1.7, -1.0])
    assert round_positions(positions, rounding, torch.tensor(scale)).tolist() == expected


def test_every_row_has_its_own_sign():
    positions = torch.full((2, 3), 0.5)
    scales = torch.tensor([[1.0], [-1.0]])
    assert round_positions(positions, "down", scales).tolist() == [[0] * 3, [1] * 3]
    assert round_positions(positions, "up", scales).tolist() == [[1] * 3, [0] * 3]


@pytest.mark.parametrize("rounding", ["nearest", "down", "up"])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_a_position_on_a_level_stays(rounding, scale):
    """Within the rounding of a float16 scale: there the whole step would be an artefact."""
    positions = torch.tensor([3.0, 3.0 + 2.0**-11, 3.0 - 2.0**-11])
    assert round_positions(positions, rounding, torch.tensor(scale)).tolist() == [3, 3, 3]


@NO_LIMIT
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1), st.sampled_from([-3.0, -1e-30, 1e-30, 0.5]), st.data())
def test_values_move_to_the_side_asked_for_by_less_than_a_step(positions, scale, data):
    rounding = data.draw(st.sampled_from(["nearest", "down", "up"]))
    before = torch.tensor(positions, dtype=torch.float64)
    codes = round_positions(before, rounding, torch.tensor(scale))
    assert torch.equal(codes, codes.round())
    moved = (codes - before) * math.copysign(1, scale)  # of the value, in steps
    least, most = {"nearest": (-0.5, 0.5), "down": (-1, TOLERANCE), "up": (-TOLERANCE, 1)}[rounding]
    assert moved.min() >= least and moved.max() <= most


@pytest.mark.parametrize(
    ("rounding", "mean", "square"), [("nearest", 0, 1 / 12), ("down", -0.5, 1 / 3), ("up", 0.5, 1 / 3)]
)
def test_moments_of_the_rounding_error(rounding, mean, square):
    """E[e] of LLC Eq. 7, in steps; one-sided rounding has four times the squared error of nearest."""
    positions = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100
    error = round_positions(positions, rounding, torch.tensor(1.0)) - positions
    assert error.mean().item() == pytest.approx(mean, abs=5e-3)
    assert error.square().mean().item() == pytest.approx(square, rel=1e-2)


# LLC Eq. 7 and 8. E[e] E[p] is the mean of one product; the bound is Chebyshev's for one product, so it holds for the
# sum of Eq. 7 too, where it is loose.


def products(mean: float, deviation: float, count: int = 400_000) -> torch.Tensor:
    """e * p for a gradient p and the error e of one-sided rounding against it, e uniform on a step."""
    generator = torch.Generator().manual_seed(0)
    gradient = mean + deviation * torch.randn(count, generator=generator, dtype=torch.float64)
    error = -math.copysign(1, mean) * torch.rand(count, generator=generator, dtype=torch.float64)
    return error * gradient


@pytest.mark.parametrize("mean", [1.0, -1.0, 1e-4])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.7, 1.0, 3.0], ids=lambda ratio: f"deviation{ratio}")
def test_the_bound_of_eq_8_holds(mean, ratio):
    sample = products(mean, ratio * abs(mean))
    bound = wrong_way_bound(Moments(mean, (ratio * mean) ** 2, len(sample)))
    chebyshev = sample.var().item() / sample.mean().item() ** 2  # Var(ep) / (E[e] E[p])^2
    assert bound == pytest.approx(chebyshev, rel=2e-2)
    assert (sample >= 0).double().mean().item() <= bound
    sums = sample.view(-1, 16).sum(1)  # <p, e>
    assert sums.mean().item() == pytest.approx(16 * -0.5 * abs(mean), rel=2e-2)  # Eq. 7: k E[e] E[p]
    assert (sums >= 0).double().mean().item() <= bound


@given(st.floats(1e-3, 1e3), st.floats(0, 1e3))
def test_the_bound_does_not_depend_on_the_sign_or_the_unit(mean, variance):
    bound = wrong_way_bound(Moments(mean, variance, 1))
    assert wrong_way_bound(Moments(-mean, variance, 1)) == bound
    assert wrong_way_bound(Moments(10 * mean, 100 * variance, 1)) == pytest.approx(bound)
    assert bound >= 1 / 3


def test_without_a_mean_there_is_no_bound():
    assert wrong_way_bound(Moments(0.0, 0.0, 4)) == math.inf
    assert wrong_way_bound(Moments(0.0, 1.0, 4)) == math.inf
    assert wrong_way_bound(Moments(1e-170, 1e-300, 4)) > 1e30  # mean^2 is 0 in floating point


@pytest.mark.parametrize(
    ("mean", "variance", "expected"),
    [
        (1.0, 0.0, "down"),
        (-1.0, 0.0, "up"),
        (2.0, 1.9, "down"),  # bound 1/3 + 4/3 * 1.9/4 = 0.97
        (-2.0, 1.9, "up"),
        (2.0, 2.1, "nearest"),
        (-2.0, 2.1, "nearest"),
        (0.0, 0.0, "nearest"),
        (0.0, 1.0, "nearest"),
        (math.nan, math.nan, "nearest"),  # a gradient that overflowed proves nothing
        (math.inf, math.nan, "nearest"),
    ],
)
def test_aligned_rounding(mean, variance, expected):
    assert aligned_rounding(Moments(mean, variance, 10)) == expected


def test_aligned_rounding_makes_the_first_order_change_negative():
    gradient = 1 + 0.3 * torch.randn(4096, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(2)) * 8
    for sign in (1, -1):
        moments = Moments((sign * gradient).mean().item(), gradient.var().item(), 4096)
        error = round_positions(weights, aligned_rounding(moments), torch.tensor(1.0)) - weights
        assert (sign * gradient) @ error < -0.45 * 4096
