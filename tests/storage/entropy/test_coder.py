"""The coder with lanes: near the entropy, the same by every decoder, and no stream is read beyond its end."""

import hashlib
import struct
import sys
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lossless.storage.entropy import coder, kernels
from hf_lossless.storage.entropy.coder import COMPILED_FROM, Kernel, SegmentDecoder, choose_kernel, encode_segments
from hf_lossless.storage.entropy.frequencies import Frequencies, MalformedCode, Segment, entropy_bytes

KERNELS = {"numpy": choose_kernel(0), "numba": choose_kernel(COMPILED_FROM)}
EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)

SEGMENTS = st.lists(
    st.tuples(st.integers(-(2**15), 2**15 - 300), st.lists(st.integers(0, 255), max_size=90)), max_size=6
)

LANES_AND_SYMBOLS = (14, 59934)
DIGEST = "6f7d5f457b8dbc9666fefba93195de04e9d3a405a0a8d7401bfa6d7dd8c6295b"
SMALL = "0100060000005c45e906"


def segment(first: int, offsets: list[int]) -> Segment:
    symbols = np.array(offsets, np.int32) + np.int32(first)
    counts = np.bincount(np.array(offsets, np.int64)) if offsets else np.zeros(0, np.int64)
    return symbols, Frequencies.of(first, counts)


def laplacian(spread: float, size: int = 200_000) -> Segment:
    symbols = np.clip(np.rint(np.random.default_rng(0).laplace(0, spread, size)), -127, 127).astype(np.int32)
    return symbols, Frequencies.of(-128, np.bincount(symbols + 128, minlength=256))


def decoded(stream: bytes, segments: list[Segment], kernel: Kernel) -> list[np.ndarray]:
    decoder = SegmentDecoder(stream, kernel)
    found = [decoder.decode(len(symbols), model) for symbols, model in segments]
    decoder.finish()
    return found


def by_the_book(stream: bytes, segments: list[Segment]) -> list[list[int]]:
    """Symbols by the formulas of `kernels`, one after the other."""
    lanes, num_symbols = struct.unpack_from("<HI", stream) if stream else (0, 0)
    states = list(struct.unpack_from(f"<{lanes}I", stream, 6)) if stream else []
    words = iter(struct.unpack_from(f"<{(len(stream) - 6 - 4 * lanes) // 2}H", stream, 6 + 4 * lanes) if stream else [])

    def next_symbol(lane: int, words: Iterator[int], model: Frequencies) -> int:
        slot = states[lane] % 2**14
        place = next(place for place, end in enumerate(model.weights.cumsum().tolist()) if slot < end)
        weight, before = int(model.weights[place]), sum(model.weights[:place].tolist())
        states[lane] = weight * (states[lane] // 2**14) + slot - before
        if states[lane] < 2**16:
            states[lane] = states[lane] * 2**16 + next(words)
        return model.first + place

    found, index = [], 0
    for symbols, model in segments:
        found.append([])
        for _ in symbols:
            if len(model.weights) == 1:
                found[-1].append(model.first)
                continue
            if index == num_symbols:
                assert next(words, None) is None
                low, high, *rooms = [state - 2**16 for state in states]
                states, lanes, words = [low + 2**16 * high], 1, iter(rooms)
            found[-1].append(next_symbol(index % lanes, words, model))
            index += 1
    return found


@EACH_KERNEL
@pytest.mark.parametrize("bytes_per_lane", [1, 2, 7, 1500])
@given(given_segments=SEGMENTS)
def test_segments_come_back_in_their_order(kernel, bytes_per_lane, given_segments):
    segments = [segment(*one) for one in given_segments]
    with mock.patch.object(coder, "BYTES_PER_LANE", bytes_per_lane):
        stream = encode_segments(segments)
        assert stream == encode_segments(segments)
    expected = [symbols.tolist() for symbols, _ in segments]
    assert by_the_book(stream, segments) == expected
    for found, symbols in zip(decoded(stream, segments, kernel), expected, strict=True):
        assert found.dtype == np.uint8 and found.tolist() == [symbol % 256 for symbol in symbols]


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 23, 24, 25, 300, 65_535])
def test_any_number_of_lanes(num_lanes):
    segments = [laplacian(0.4, 5_000), segment(7, [0] * 90), laplacian(3.0, 3_001), laplacian(0.1, 1)]
    with mock.patch.object(coder, "_number_of_lanes", lambda coded: num_lanes):
        stream = encode_segments(segments)
    assert struct.unpack_from("<H", stream) == (num_lanes,)
    for kernel in KERNELS.values():
        for found, (symbols, _) in zip(decoded(stream, segments, kernel), segments, strict=True):
            assert np.array_equal(found.view(np.int8), symbols)


@pytest.mark.parametrize("spread", [0.1, 0.5, 3.0, 30.0])
def test_size_is_near_the_entropy(spread):
    one = laplacian(spread)
    counts = np.bincount(one[0] + 128, minlength=256)
    model = one[1]
    bits = counts[counts > 0] @ (14 - np.log2(model.weights[model.weights > 0]))
    stream = encode_segments([one])
    assert entropy_bytes(counts) <= len(stream) <= 1.02 * entropy_bytes(counts) + 12
    assert bits / 8 <= len(stream) <= 1.001 * bits / 8 + 12


def test_lanes_take_a_thousandth_at_most():
    segments = [laplacian(1.0)]
    stream = encode_segments(segments)
    (lanes,) = struct.unpack_from("<H", stream)
    assert lanes == len(stream) // coder.BYTES_PER_LANE > 30
    with mock.patch.object(coder, "_number_of_lanes", lambda coded: 1):
        alone = encode_segments(segments)
    assert len(alone) < len(stream) <= 1.001 * len(alone)


def test_the_bytes_are_pinned():
    """Every machine writes these, and each later release reads them."""
    places = np.arange(60_000, dtype=np.int64)
    symbols = (places**2 % 11 + places % 3 * (places % 5 == 0) - 6).astype(np.int32)
    segments = [(symbols, Frequencies.of(-6, np.bincount(symbols + 6))), segment(200, [0, 1, 2, 0, 0, 55])]
    stream = encode_segments(segments)
    assert struct.unpack_from("<HI", stream) == LANES_AND_SYMBOLS
    assert hashlib.sha256(stream).hexdigest() == DIGEST
    assert encode_segments(segments[1:]).hex() == SMALL


def test_what_is_known_takes_nothing():
    assert encode_segments([segment(5, [0] * 1000), segment(-3, [])]) == b""
    decoder = SegmentDecoder(b"")
    assert (decoder.decode(1000, Frequencies.of(5, np.array([1]))) == 5).all()
    decoder.finish()
    with pytest.raises(MalformedCode, match="ends before its symbols do"):
        decoder.decode(1, Frequencies.of(5, np.array([1, 1])))


@EACH_KERNEL
@pytest.mark.parametrize("num_lanes", [1, 3, 40])
def test_what_cannot_be_a_stream(num_lanes, kernel):
    symbols, model = segment(0, [0, 1, 2, 3, 200] * 400)
    with mock.patch.object(coder, "_number_of_lanes", lambda coded: num_lanes):
        stream = encode_segments([(symbols, model)])

    def read(stream: bytes, size: int = len(symbols)) -> None:
        decoder = SegmentDecoder(stream, kernel)
        decoder.decode(size, model)
        decoder.finish()

    read(stream)
    with pytest.raises(MalformedCode, match=rf"a stream of {len(stream) - 1} bytes cannot have {num_lanes} lanes"):
        read(stream[:-1])
    with pytest.raises(MalformedCode, match=rf"a stream of {4 * num_lanes + 4} bytes cannot have {num_lanes} lanes"):
        read(stream[: 4 * num_lanes + 4])
    with pytest.raises(MalformedCode, match="a stream of 2 bytes cannot have 0 lanes"):
        read(b"\0\0")
    with pytest.raises(MalformedCode, match="a lane begins in the state 65535, and 65536 is the least"):
        read(stream[:6] + struct.pack("<I", 2**16 - 1) + stream[10:])
    with pytest.raises(MalformedCode, match="ends before its symbols do"):
        read(stream[:-2])
    for size in (1, len(symbols) // 2, len(symbols) - 1):
        with pytest.raises(MalformedCode, match="does not end where its symbols do"):
            read(stream, size)
    for longer in (stream + b"\0\0", stream + b"\1\2"):
        with pytest.raises(MalformedCode, match="does not end where its symbols do"):
            read(longer)
    for size in (len(symbols) + 1, 2 * len(symbols)):
        with pytest.raises(MalformedCode, match=r"ends before its symbols do|does not end where"):
            read(stream, size)
    with pytest.raises(MalformedCode, match="3 symbols have an empty model"):
        SegmentDecoder(stream, kernel).decode(3, Frequencies(0, np.zeros(0, np.int64)))


def test_a_tail_that_is_none():
    symbols, model = segment(0, [0, 1] * 300)
    with mock.patch.object(coder, "_number_of_lanes", lambda coded: 2):
        lanes, num_symbols = struct.unpack_from("<HI", encode_segments([(symbols, model)]))
    # Two lanes of one symbol of one half each, which leaves them where they are but for a word.
    stream = struct.pack("<HIII", lanes, 2, 2**17, 2**17)
    decoder = SegmentDecoder(stream)
    assert lanes == 2 and 0 < num_symbols < 600
    decoder.decode(2, model)
    with pytest.raises(MalformedCode, match="its tail begins in the state 0, and 65536 is the least"):
        decoder.decode(1, model)


@EACH_KERNEL
@given(st.binary(max_size=300), st.integers(1, 40), st.integers(0, 300))
def test_any_bytes_are_refused_or_read_within_their_bounds(kernel, content, lanes, left):
    stream = struct.pack("<HI", lanes, left) + content
    _, model = segment(0, [0, 0, 0, 1, 2, 5])
    try:
        decoder = SegmentDecoder(stream, kernel)
        found = decoder.decode(500, model)
    except MalformedCode:
        return
    assert set(found.tolist()) <= {0, 1, 2, 5}


def test_numba_is_chosen_where_it_pays(monkeypatch):
    compiled = pytest.importorskip("hf_lossless.storage.entropy.compiled")
    assert choose_kernel(COMPILED_FROM) is compiled.decode_lanes
    assert choose_kernel(COMPILED_FROM - 1) is kernels.decode_lanes
    monkeypatch.delitem(sys.modules, "hf_lossless.storage.entropy.compiled")
    monkeypatch.delattr("hf_lossless.storage.entropy.compiled")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert choose_kernel(COMPILED_FROM) is kernels.decode_lanes
