"""Models: they add up, they come back, and what does not add up is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lossless.storage.entropy.frequencies import TOTAL, Frequencies, MalformedCode, entropy_bytes, read_frequencies

COUNTS = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=256),
    st.lists(st.sampled_from([0, 1, 10**9]), min_size=1, max_size=256),
    st.lists(st.integers(0, 10**12), min_size=1, max_size=256),
)


@given(st.integers(-(2**15), 2**15 - 257), COUNTS)
def test_every_symbol_that_occurs_can_be_coded(first, counts):
    counts = np.array(counts, np.int64)
    model = Frequencies.of(first, counts)
    if not counts.any():
        assert len(model.weights) == 0
        return
    assert model.weights.sum() == TOTAL
    present = np.flatnonzero(counts)
    assert model.first == first + present[0] and len(model.weights) == present[-1] - present[0] + 1
    assert np.array_equal(model.weights > 0, counts[present[0] : present[-1] + 1] > 0) and model.weights.min() >= 0
    # As near to the counts as whole numbers that leave none out can be.
    shares = counts[present] * (TOTAL / counts.sum())
    found = model.weights[present - present[0]]
    assert (np.abs(found - shares)[found > 1] < 1 + np.maximum(0, 1 - shares).sum()).all()


@given(st.integers(-(2**15), 2**15 - 257), COUNTS, st.binary(max_size=5), st.binary(max_size=5))
def test_bytes_and_back(first, counts, before, after):
    model = Frequencies.of(first, np.array(counts, np.int64))
    stored = model.to_bytes()
    again, end = read_frequencies(before + stored + after, len(before))
    assert end == len(before) + len(stored)
    assert np.array_equal(again.weights, model.weights) and (not len(model.weights) or again.first == model.first)


@pytest.mark.parametrize("size", range(200, 257))
def test_many_symbols_alike(size):
    """Rounding each up adds more than any of them has."""
    weights = Frequencies.of(0, np.ones(size, np.int64)).weights
    assert weights.sum() == TOTAL and np.ptp(weights) <= 1


def test_half_of_the_symbols_hardly_ever():
    counts = np.array([1, 10**6] * 128)
    weights = Frequencies.of(0, counts).weights
    assert weights.sum() == TOTAL and (weights[::2] == 1).all() and weights[1::2].min() == 127


def test_the_layout():
    """Number of symbols, the first as int16, LEB128 of each frequency; pinned, for files are read for years."""
    assert Frequencies.of(-2, np.array([1, 2, 1])).to_bytes().hex() == "03feff802080408020"
    assert Frequencies.of(0, np.zeros(4, np.int64)).to_bytes() == b"\0"
    assert Frequencies.of(300, np.array([7])).to_bytes().hex() == "012c01808001"


def varint(value: int) -> bytes:
    return bytes([value % 128 + 128, *varint(value // 128)]) if value >= 128 else bytes([value])


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"", "ends in the middle of a number"),
        (b"\x80", "ends in the middle of a number"),
        (b"\x80\x80\x80\x80\x80\x01", "ends in the middle of a number"),
        (b"\x02\x00", "ends in the middle of a number"),
        (b"\x02\x00\x00" + varint(TOTAL), "ends in the middle of a number"),
        (varint(257) + b"\0\0" + varint(64) * 257, "a model of 257 symbols, where 256 is the most"),
        (b"\xff\xff\xff\xff\x0f\0\0", "a model of 4294967295 symbols, where 256 is the most"),
        (b"\x02\0\0" + varint(1) + varint(TOTAL), "add up to 16385, not to 16384"),
        (b"\x02\0\0" + varint(0) + varint(0), "add up to 0, not to 16384"),
    ],
)
def test_refused(stored, message):
    with pytest.raises(MalformedCode, match=message):
        read_frequencies(stored, 0)


def test_entropy_against_its_definition():
    counts = np.array([3, 0, 1, 4, 0])
    bits = -sum(count * np.log2(count / 8) for count in (3, 1, 4))
    assert entropy_bytes(counts) == np.ceil(bits / 8) == 2
    assert entropy_bytes(np.array([0, 9, 0])) == 0 and entropy_bytes(np.zeros(3, np.int64)) == 0
