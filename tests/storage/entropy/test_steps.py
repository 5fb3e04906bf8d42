"""Steps in a byte: within a sixteenth of what was asked, and the same on every machine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hf_lossless.storage.entropy.steps import decode_steps, encode_steps

EXPONENTS = 32


def stored(steps: NDArray[np.floating]) -> NDArray[np.float32]:
    return decode_steps(*encode_steps(np.asarray(steps, np.float32)))


@given(st.lists(st.floats(2.0**-20, 2.0**10, width=32), min_size=1, max_size=20), st.integers(-70, 80))
def test_within_a_sixteenth(steps, octaves):
    asked = np.array(steps, np.float32) * np.float32(2.0**octaves)
    found = stored(asked)
    assert found.dtype == np.float32
    assert (np.abs(found / asked.astype(np.float64) - 1) <= 1 / 16).all()


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(-15, 15)), min_size=1, max_size=20), st.integers(-80, 80))
def test_eighths_of_powers_of_two_are_exact(parts, octaves):
    steps = np.array([(1 + eighths / 8) * 2.0 ** (exponent + octaves) for eighths, exponent in parts], np.float32)
    assert np.array_equal(stored(steps), steps)
    assert np.array_equal(stored(stored(steps)), stored(steps))


@given(st.lists(st.floats(2.0**-149, 2.0**128 - 2.0**104, width=32, exclude_min=False), min_size=1, max_size=9))
def test_any_float_comes_back_positive_and_finite_and_in_order(steps):
    asked = np.array(steps, np.float32)
    codes, base = encode_steps(asked)
    assert codes.dtype == np.uint8 and -128 <= base <= 127
    found = decode_steps(codes, base)
    assert np.isfinite(found).all() and (found > 0).all()
    order = np.argsort(asked, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    assert np.array_equal(stored(found), found)


def test_what_is_far_below_the_largest_is_the_smallest():
    found = stored(np.array([1.0, 2.0**-31, 2.0**-40, 1e-38]))
    assert found.tolist() == [1.0, 2.0**-31, 2.0**-31, 2.0**-31]


@pytest.mark.parametrize("code", [0, 1, 7, 8, 200, 255])
@pytest.mark.parametrize("base", [-128, -31, 0, 96])
def test_the_formula(code, base):
    [step] = decode_steps(np.array([code], np.uint8), base)
    assert step == np.float32((1 + code % 8 / 8) * 2.0 ** (code // 8 + base))
