"""Units of numbers far from one: powers of two, by which nothing is lost."""

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lossless.calibration import units
from hf_lossless.calibration.units import in_unit, unit_of, unit_of_size

SIZES = st.floats(2.0**-149, 2.0**127, width=32)


@given(st.lists(SIZES | SIZES.map(lambda size: -size) | st.just(0.0), min_size=1, max_size=6))
def test_division_by_the_unit_loses_nothing(numbers):
    values = torch.tensor(numbers)
    unit, largest = unit_of(values), values.abs().max().item()
    if largest == 0:
        assert unit == 0 and in_unit(values, unit) is values
        return
    assert math.frexp(unit)[0] == 0.5  # a power of two
    scaled = in_unit(values, unit)
    assert 2.0**-33 < scaled.abs().max() < 2.0**33
    reached = values.abs() >= largest * 2.0**-60  # beyond that, smaller ones may leave float32
    assert torch.equal(scaled[reached].double() * unit, values[reached].double())


@pytest.mark.parametrize("size", [1.0, 2.0**-32, 2.0**32, 3e-9])
def test_ordinary_numbers_are_left_alone(size):
    values = torch.tensor([-size, size / 3])
    assert unit_of(values) == 1 and in_unit(values, 1.0) is values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_of_every_dtype(dtype):
    assert unit_of(torch.tensor([6e-8, 0.0], dtype=dtype)) == 1
    assert unit_of(torch.zeros(3, dtype=dtype)) == unit_of(torch.zeros(0, 4, dtype=dtype)) == 0
    if dtype != torch.float16:
        assert unit_of(torch.tensor([[3e-30], [1e-35]], dtype=dtype)) == 2.0**-99
        assert unit_of(torch.tensor([1e30, -3e30], dtype=dtype).requires_grad_()) == 2.0**101


def test_units_have_inverses_in_float32():
    assert unit_of(torch.tensor([1e-45])) == 2.0**-126 and unit_of(torch.tensor([3e38])) == 2.0**126
    assert (
        unit_of(torch.tensor([1e-300], dtype=torch.float64)) == 2.0**-126
        and unit_of(torch.tensor([1e300], dtype=torch.float64)) == 2.0**126
    )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_has_the_unit_one(value):
    assert unit_of(torch.tensor([1e-30, value])) == 1


def test_what_counts_as_ordinary_can_be_widened():
    assert unit_of_size(1e-20) == 2.0**-67 and unit_of_size(1e-20, ordinary=80) == 1
    assert unit_of_size(1e-200, ordinary=80) == 2.0**-665


def test_docstring_examples():
    result = doctest.testmod(units)
    assert result.failed == 0 and result.attempted == 2
