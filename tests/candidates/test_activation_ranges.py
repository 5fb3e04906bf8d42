"""Static ranges: the expected error against many numbers, and the choice against what could have been chosen."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_lossless.calibration.activations import NUM_BINS, ActivationStatistics, bin_of
from hf_lossless.calibration.statistics import InputStatistics, Moments
from hf_lossless.candidates.activation_ranges import best_static_grid, squared_errors
from hf_lossless.storage.activation_grid import on_activation_grid, scale_and_zero


def seen(values: Tensor, curvature: Tensor | None = None) -> tuple[InputStatistics, ActivationStatistics]:
    """What the calibration pass would have gathered of these values."""
    values = values.double().flatten()
    curvature = torch.ones_like(values) if curvature is None else curvature.double().flatten()
    mean = values.mean().item()
    inputs = InputStatistics(
        Moments(mean, (values - mean).square().mean().item(), len(values)),
        (values - mean).abs().mean().item(),
        values.min().item(),
        values.max().item(),
        Moments(0.0, 0.0, len(values)),
    )
    bins = bin_of(values)
    counts = torch.bincount(bins, minlength=NUM_BINS).double()
    return inputs, ActivationStatistics(counts, torch.bincount(bins, curvature, minlength=NUM_BINS), {})


def error_of(values: Tensor, grid, bits: int) -> float:
    return (on_activation_grid(values, grid.scale, grid.zero, bits) - values).square().mean().item()


@given(
    st.floats(-3, 3),
    st.floats(0, 5),
    st.floats(0.01, 2),
    st.integers(2, 8).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, 2**b - 1))),
)
def test_squared_errors_are_those_of_many_numbers(lower, width, scale, bits_and_zero):
    bits, zero = bits_and_zero
    numbers = torch.linspace(lower, lower + width, 20001, dtype=torch.float64)
    codes = ((numbers / scale).round() + zero).clamp(0, 2**bits - 1)
    errors = (scale * (codes - zero) - numbers).square()
    ends = torch.tensor([lower]).double(), torch.tensor([lower + width]).double()
    found = squared_errors(*ends, torch.tensor([[scale]]).double(), torch.tensor([[float(zero)]]), bits)
    assert found.item() == pytest.approx(errors.mean().item(), rel=5e-3, abs=1e-4 * scale**2)


def test_an_interval_of_no_width_is_one_value():
    ends = torch.tensor([0.0, 0.75, 9.0]).double()
    found = squared_errors(ends, ends, torch.tensor([[1.0]]), torch.tensor([[1.0]]), bits=2)
    assert found.tolist() == [[0.0, 0.0625, 49.0]]


SAMPLES = {
    "gauss": torch.randn(20000, generator=torch.Generator().manual_seed(0)),
    "relu": torch.randn(20000, generator=torch.Generator().manual_seed(1)).relu(),
    "gelu": torch.nn.functional.gelu(2 * torch.randn(20000, generator=torch.Generator().manual_seed(2))),
    "outliers": torch.cat([torch.randn(20000, generator=torch.Generator().manual_seed(3)), torch.tensor([60.0] * 5)]),
    "far-from-zero": 50 + torch.randn(20000, generator=torch.Generator().manual_seed(4)),
    "negative": -torch.randn(20000, generator=torch.Generator().manual_seed(5)).abs() - 1,
}


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_the_chosen_grid(name, bits):
    values = SAMPLES[name]
    inputs, activations = seen(values)
    grid, errors = best_static_grid(inputs, activations, bits)
    assert grid.scale.dtype == torch.float32 and grid.zero.dtype == torch.uint8
    assert grid.scale.shape == grid.zero.shape == (1,)
    real = error_of(values, grid, bits)
    expected = (errors @ activations.counts).item() / len(values)
    assert expected == pytest.approx(real, rel=0.1)
    whole = scale_and_zero(values.min(), values.max(), bits)
    # Bins near 50 are wider than these values are spread, so that there the choice is a rough one.
    assert (
        real
        <= (1.5 if name == "far-from-zero" else 1.05)
        * (on_activation_grid(values, *whole, bits) - values).square().mean()
    )
    if name == "relu":
        assert grid.zero == 0  # no code is spent on what is never seen


def test_outliers_are_clipped_unless_the_loss_depends_on_them():
    values = SAMPLES["outliers"]
    indifferent, _ = best_static_grid(*seen(values, (values < 10).double()), bits=4)
    dependent, _ = best_static_grid(*seen(values, torch.where(values < 10, 1.0, 1e6)), bits=4)
    assert 15 * indifferent.scale < 20 and 15 * dependent.scale > 55


@pytest.mark.parametrize("value", [0.0, 5.0, -0.125, 1e-38, 1e30])
def test_constant_inputs(value):
    values = torch.full((10,), value)
    grid, errors = best_static_grid(*seen(values), bits=8)
    assert errors.max() <= max(1e-6 * abs(value), 1e-40) ** 2
    torch.testing.assert_close(on_activation_grid(values, grid.scale, grid.zero, 8), values)


def test_inputs_that_the_loss_never_saw():
    inputs, _ = seen(SAMPLES["gauss"])
    nothing = ActivationStatistics(torch.zeros(NUM_BINS).double(), torch.zeros(NUM_BINS).double(), {})
    grid, errors = best_static_grid(inputs, nothing, bits=8)
    assert not errors.any()
    assert grid.scale.item() == pytest.approx((inputs.maximum - inputs.minimum) / 255)  # the whole range


def test_the_loss_depends_on_none_of_the_values():
    inputs, activations = seen(SAMPLES["gauss"], torch.zeros(20000))
    grid, _ = best_static_grid(inputs, activations, bits=8)
    assert math.isfinite(grid.scale.item()) and grid.scale > 0
