"""Grids of activations against a loop over numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_lossless.storage.activation_grid import (
    DYNAMIC_AXES,
    dynamic_range,
    may_quantise_input,
    on_activation_grid,
    scale_and_zero,
)

NUMBERS = st.floats(-1e6, 1e6, width=32)


def by_loop(values: list[float], low: float, high: float, bits: int) -> list[float]:
    """The nearest level to each value, found by looking at all of them."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1) or 1.0
    zero = round(-low / step)
    levels = [step * (code - zero) for code in range(2**bits)]
    return [min(levels, key=lambda level: abs(level - value)) for value in values]


def on_range(values: Tensor, low: float, high: float, bits: int) -> Tensor:
    return on_activation_grid(values, *scale_and_zero(torch.tensor(low), torch.tensor(high), bits), bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("ends", [(-1.0, 2.0), (0.0, 3.0), (-0.17, 5.0), (1.0, 4.0), (-4.0, -1.0)], ids=str)
def test_nearest_level(bits, ends):
    values = torch.randn(200, generator=torch.Generator().manual_seed(bits)) * 3
    expected = torch.tensor(by_loop(values.tolist(), *ends, bits))
    torch.testing.assert_close(on_range(values, *ends, bits), expected, rtol=1e-5, atol=1e-6)


@given(st.lists(NUMBERS, min_size=1, max_size=8), NUMBERS, NUMBERS, st.integers(2, 8))
def test_zero_is_a_level_and_errors_inside_are_at_most_a_step(numbers, low, high, bits):
    low, high = min(low, high), max(low, high)
    scale, zero = scale_and_zero(torch.tensor(low), torch.tensor(high), bits)
    assert scale > 0 and zero == zero.round() and 0 <= zero <= 2**bits - 1
    assert on_range(torch.zeros(1), low, high, bits) == 0
    inside = torch.tensor(numbers).clamp(min(low, 0.0), max(high, 0.0))
    error = (on_range(inside, low, high, bits) - inside).abs().max()
    assert error <= scale * 1.001  # half a step, and at the ends as much as the zero point moved


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_more_bits_never_hurt(bits):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    errors = [(on_range(values, -3.0, 3.0, width) - values).square().mean() for width in (bits, bits + 1)]
    assert errors[1] < errors[0]


def test_a_dynamic_range_is_that_of_each_position_or_image():
    tokens, images = torch.randn(2, 5, 7), torch.randn(2, 3, 4, 4)
    low, high = dynamic_range(tokens, DYNAMIC_AXES["linear"])
    assert low.shape == (2, 5, 1) and torch.equal(high[1, 2, 0], tokens[1, 2].max())
    low, high = dynamic_range(images, DYNAMIC_AXES["conv2d"])
    assert low.shape == (2, 1, 1, 1) and torch.equal(low[1, 0, 0, 0], images[1].min())
    alone, _ = dynamic_range(images[0], DYNAMIC_AXES["conv2d"])  # without a batch
    assert alone.shape == (1, 1, 1)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_a_constant_is_kept(value):
    values = torch.full((4,), value)
    torch.testing.assert_close(on_range(values, value, value, 8), values)


def test_what_is_not_finite_is_not_hidden():
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert on_range(values, -1.0, 2.0, 2).isnan().tolist() == [True, False, False, False]
    assert on_range(values, -1.0, 2.0, 2)[1:].tolist() == [2.0, -1.0, 1.0]  # to the ends, as any number
    low, high = dynamic_range(values[None], (-1,))
    assert on_activation_grid(values[None], *scale_and_zero(low, high, 8), 8).isnan().all()


def test_the_largest_range_of_float32():
    huge = torch.finfo(torch.float32).max
    scale, zero = scale_and_zero(torch.tensor(-huge), torch.tensor(huge), 8)
    assert scale.isfinite() and zero in (127, 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    values = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(dtype)
    quantised = on_range(values, -2.0, 2.0, 8)
    assert quantised.dtype == dtype
    assert torch.equal(quantised, on_range(values.float(), -2.0, 2.0, 8).to(dtype))


def test_which_inputs():
    assert [may_quantise_input(kind, ()) for kind in ("linear", "conv1d", "conv2d", "embedding")] == [True] * 3 + [
        False
    ]
    assert not may_quantise_input("linear", ("decoder",))
