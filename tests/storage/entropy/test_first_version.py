"""The coder of version 1: what earlier releases wrote is read, and nothing beyond its end."""

import sys

import numpy as np
import pytest
from decoding import first_version_stream
from hypothesis import given
from hypothesis import strategies as st

from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.entropy.first_version import FirstVersionDecoder
from hf_lossless.storage.entropy.frequencies import Frequencies, MalformedCode

SEGMENTS = st.lists(
    st.tuples(st.integers(-(2**15), 2**15 - 300), st.lists(st.integers(0, 255), max_size=40)), max_size=6
)


def segment(first: int, offsets: list[int]):
    symbols = np.array(offsets, np.int32) + np.int32(first)
    counts = np.bincount(np.array(offsets, np.int64)) if offsets else np.zeros(0, np.int64)
    return symbols, Frequencies.of(first, counts)


@given(SEGMENTS)
def test_segments_come_back_in_their_order(given_segments):
    segments = [segment(*one) for one in given_segments]
    stream = first_version_stream(segments)
    assert stream == first_version_stream(segments) and len(stream) % 4 == 0
    decoder = FirstVersionDecoder(stream)
    for symbols, model in segments:
        found = decoder.decode(len(symbols), model)
        assert found.dtype == np.uint8 and np.array_equal(found, symbols % 256)
    decoder.finish()


def test_what_is_known_takes_nothing():
    assert first_version_stream([segment(5, [0] * 1000), segment(-3, [])]) == b""
    decoder = FirstVersionDecoder(b"")
    assert (decoder.decode(1000, Frequencies.of(5, np.array([1]))) == 5).all()
    decoder.finish()


def test_what_cannot_be_a_stream():
    symbols, model = segment(0, [0, 1, 2, 3, 200] * 10)
    stream = first_version_stream([(symbols, model)])
    with pytest.raises(MalformedCode, match=r"a stream of \d+ bytes, which is no whole number of words"):
        FirstVersionDecoder(stream[:-1])
    with pytest.raises(MalformedCode, match="cannot be read"):
        FirstVersionDecoder(stream + b"\0\0\0\0")
    decoder = FirstVersionDecoder(stream)
    decoder.decode(len(symbols) - 1, model)
    with pytest.raises(MalformedCode, match="does not end where its symbols do"):
        decoder.finish()
    with pytest.raises(MalformedCode, match="3 symbols have an empty model"):
        decoder.decode(3, Frequencies(0, np.zeros(0, np.int64)))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(
        ConfigurationError, match=r"format version 5 need .* not installed\. .*'hf-lossless\[entropy\]'"
    ):
        FirstVersionDecoder(b"")
