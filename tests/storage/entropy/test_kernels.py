"""Decoders of lanes: numba's and numpy's give the same symbols, states and words from any bytes, at any place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_lossless.storage.entropy import kernels
from hf_lossless.storage.entropy.frequencies import Frequencies

LANES = st.one_of(st.integers(1, 5), st.integers(20, 60))
COUNTS = st.lists(st.sampled_from([0, 1, 1, 3, 50, 4000]), min_size=2, max_size=256)


@given(st.data(), LANES, COUNTS, st.integers(-300, 300), st.integers(0, 400), st.integers(0, 150))
def test_both_do_the_same(data, num_lanes, counts, first, size, num_words):
    compiled = pytest.importorskip("hf_lossless.storage.entropy.compiled")
    counts[0], counts[-1] = counts[0] or 1, counts[-1] or 2
    model = Frequencies.of(first, np.array(counts))
    states = data.draw(arrays(np.uint32, num_lanes, elements=st.integers(2**16, 2**32 - 1)))
    words = data.draw(arrays(np.uint16, num_words, elements=st.integers(0, 2**16 - 1)))
    lane = data.draw(st.integers(0, num_lanes - 1))
    position = data.draw(st.integers(0, num_words))
    ends = []
    for decode_lanes in (kernels.decode_lanes, compiled.decode_lanes):
        symbols, after = np.zeros(size, np.uint8), states.copy()
        end = decode_lanes(words, position, after, lane, model, symbols)
        ends.append((end, *((symbols.tolist(), after.tolist()) if end >= 0 else ())))
    assert ends[0] == ends[1]


@given(COUNTS, st.lists(st.integers(0, 255), max_size=200), LANES)
def test_what_is_encoded_is_decoded(counts, places, num_lanes):
    counts[0], counts[-1] = counts[0] or 1, counts[-1] or 2
    model = Frequencies.of(0, np.array(counts))
    present = np.flatnonzero(model.weights)
    symbols = present[np.array(places, np.int64) % len(present)]
    weights, starts = model.weights.astype(np.uint16)[symbols], model.starts.astype(np.uint16)[symbols]
    states = np.arange(num_lanes, dtype=np.int64) + kernels.LOW
    words = kernels.encode_lanes(weights, starts, states)
    assert (states >= kernels.LOW).all() and (states < 2**32).all()
    decoded, after = np.empty(len(symbols), np.uint8), states.astype(np.uint32)
    assert kernels.decode_lanes(words, 0, after, 0, model, decoded) == len(words)
    assert np.array_equal(decoded, symbols) and np.array_equal(after, np.arange(num_lanes) + kernels.LOW)


@pytest.mark.parametrize(("num_symbols", "left"), [(3, 0), (1000, None)])
def test_the_tail_takes_what_fits(num_symbols, left):
    model = Frequencies.of(0, np.array([5, 1, 1, 1]))
    symbols = np.arange(num_symbols) % 4
    weights, starts = model.weights.astype(np.uint16)[symbols], model.starts.astype(np.uint16)[symbols]
    remaining, words = kernels.encode_tail(weights, starts, 20)
    assert len(words) == 20
    assert remaining == left or (left is None and 0.9 < (num_symbols - remaining) * 2.4 / (16 * 20) < 1.1)
    state = np.array([int(words[0]) + 2**16 * int(words[1])], np.uint32)
    decoded = np.empty(num_symbols - remaining, np.uint8)
    end = kernels.decode_lanes(words[2:], 0, state, 0, model, decoded)
    assert np.array_equal(decoded, symbols[remaining:]) and state == [kernels.LOW] and not words[2 + end :].any()
