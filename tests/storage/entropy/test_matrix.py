"""Coded matrices: they come back exactly, and no change of their bytes makes them another matrix."""

import struct
import tracemalloc
import zlib
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from hf_lossless.storage.entropy import coder
from hf_lossless.storage.entropy.frequencies import MalformedCode, entropy_bytes, read_frequencies
from hf_lossless.storage.entropy.levels import best_levels, model_counts
from hf_lossless.storage.entropy.matrix import LARGEST_CODE, OVERHEAD_BYTES, CodedMatrix, decode, encode
from hf_lossless.storage.entropy.steps import decode_steps, encode_steps

CHECKSUM = OVERHEAD_BYTES - 4
"""Where the checksum of all bytes is."""


def stored(steps) -> NDArray[np.float32]:
    return decode_steps(*encode_steps(np.asarray(steps, np.float32)))


def matrix_of(codes, rows=None, columns=None) -> CodedMatrix:
    codes = np.array(codes, np.int32)
    rows = np.ones(codes.shape[0]) if rows is None else rows
    columns = np.ones(codes.shape[1]) if columns is None else columns
    return CodedMatrix.of(codes, stored(rows), stored(columns))


def same(one: CodedMatrix, other: CodedMatrix) -> bool:
    parts = ("codes", "row_steps", "column_steps", "far_positions", "far_codes")
    pairs = [(getattr(one, part), getattr(other, part)) for part in parts]
    return all(a.dtype == b.dtype and np.array_equal(a, b) and a.flags.c_contiguous for a, b in pairs)


def spread_out(out: int, into: int, width: float, seed: int = 0) -> CodedMatrix:
    """Laplacian codes whose spread differs from row to row and from column to column, steps likewise."""
    generator = np.random.default_rng(seed)
    rows, columns = 2.0 ** generator.normal(0, 1, out), 2.0 ** generator.normal(0, 1, into)
    codes = np.rint(generator.laplace(0, width, (out, into)) / np.outer(rows, columns))
    return matrix_of(np.clip(codes, -LARGEST_CODE, LARGEST_CODE), rows, columns)


VALUES = st.one_of(
    st.integers(-2, 2),
    st.integers(-130, 130),
    st.sampled_from([0, 127, -127, 128, -128, LARGEST_CODE, -LARGEST_CODE, 70_000]),
)
STEPS = st.floats(2.0**-149, 2.0**127, width=32)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.just(1), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.just(1)),
)
MATRICES = SHAPES.flatmap(
    lambda shape: st.builds(
        matrix_of,
        st.one_of(arrays(np.int32, shape, elements=VALUES), VALUES.map(lambda value: np.full(shape, value))),
        st.lists(STEPS, min_size=shape[0], max_size=shape[0]),
        st.lists(STEPS, min_size=shape[1], max_size=shape[1]),
    )
)


@given(MATRICES)
def test_round_trip(matrix):
    coded = encode(matrix)
    assert coded.dtype == np.uint8 and np.array_equal(coded, encode(matrix))
    assert same(decode(coded, matrix.codes.shape), matrix)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (70, 300), (300, 70)], ids=str)
@pytest.mark.parametrize("width", [0.0, 0.05, 1.0, 60.0, 1e5])
def test_round_trip_of_what_is_like_a_layer(shape, width):
    matrix = spread_out(*shape, width)
    assert same(decode(encode(matrix), shape), matrix)


def test_levels_with_gaps():
    """No rows and columns have the model numbers in between."""
    for codes in ([[0, 1]], [[0], [100]], [[0, 90, 0], [1, 127, 0]]):
        matrix = matrix_of(codes)
        assert same(decode(encode(matrix), matrix.codes.shape), matrix)


def test_a_transposed_view_is_no_other_matrix():
    codes = np.arange(-30, 30, dtype=np.int32).reshape(6, 10)
    matrix = CodedMatrix.of(codes.T, stored(np.ones(10)), stored(np.ones(6)))
    assert same(decode(encode(matrix), (10, 6)), matrix_of(codes.T.copy()))


def test_far_codes_are_apart():
    matrix = matrix_of([[0, 128, -5], [-127, LARGEST_CODE, -128]])
    assert matrix.codes.tolist() == [[0, 0, -5], [-127, 0, 0]]
    assert matrix.far_positions.tolist() == [1, 4, 5] and matrix.far_codes.tolist() == [128, LARGEST_CODE, -128]


def test_a_matrix_of_zeros_takes_hardly_anything():
    assert len(encode(matrix_of(np.zeros((1000, 1000))))) <= OVERHEAD_BYTES + 40


@pytest.mark.parametrize("width", [0.2, 1.0, 8.0])
def test_size_is_within_two_per_cent_of_the_entropy(width):
    matrix = spread_out(512, 768, width)
    levels, estimated = best_levels(matrix.codes)
    of_codes = sum(map(entropy_bytes, model_counts(matrix.codes, levels)))
    of_sides = sum(entropy_bytes(np.bincount(side)) for side in (levels.rows, levels.columns))
    of_steps = sum(
        entropy_bytes(np.bincount(encode_steps(side)[0])) for side in (matrix.row_steps, matrix.column_steps)
    )
    size = len(encode(matrix)) - OVERHEAD_BYTES - 8 * len(matrix.far_codes)
    entropy = of_codes + of_sides + of_steps
    models = 2 * 256 * 4 + 3 * 256 * levels.num_models
    assert entropy <= size <= 1.02 * of_codes + of_sides + of_steps + models
    assert size - of_steps == pytest.approx(estimated, rel=0.02)


def test_the_bytes_are_pinned():
    """A file written today is read by every later release: on any machine these bytes are this matrix."""
    codes = np.array([[0, 1, -1, 2], [0, 0, 300, 0], [-40, 9, 0, -100_000]], np.int32)
    rows, columns = np.float32([1.0, 0.5, 3.5]), np.float32([0.25, 0.25, 0.3125, 2.0**-20])
    matrix = CodedMatrix.of(codes, rows, columns)
    assert encode(matrix).tobytes().hex() == GOLDEN
    for stored in (FIRST_VERSION, GOLDEN):
        found = decode(np.frombuffer(bytes.fromhex(stored), np.uint8), (3, 4))
        assert same(found, matrix)
    assert found.codes.tolist() == [[0, 1, -1, 2], [0, 0, 0, 0], [-40, 9, 0, 0]]
    assert found.far_positions.tolist() == [6, 11] and found.far_codes.tolist() == [300, -100_000]
    assert found.row_steps.tolist() == rows.tolist() and found.column_steps.tolist() == columns.tolist()


GOLDEN = (
    "48464c4502e2df03000000040000000200000045010000440cac6ba338cbc8060000000b0000002c0100006079feff17"
    "e800d62a00000000000000d52a00000000000000000000000000d52a9301680080200000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000008040008020180000d62a0000000000"
    "00000000000000000000d52a000000000000d52a0b000080200080200000008020000000802001000080800100010000"
    "808001000000010000808001000000010000808001000000000001ffff80800100010200808001000000010100808001"
    "01000080800100010000808001010000808001000001090080800100000001d8ff80800101000e0000006c1eba00a245"
)

FIRST_VERSION = (
    "48464c4501e2df03000000040000000200000045010000440cac6bb172d8fc060000000b0000002c0100006079feff17"
    "e800d62a00000000000000d52a00000000000000000000000000d52a9301680080200000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000008040008020180000d62a0000000000"
    "00000000000000000000d52a000000000000d52a0b000080200080200000008020000000802001000080800100010000"
    "808001000000010000808001000000010000808001000000000001ffff80800100010200808001000000010100808001"
    "01000080800100010000808001010000808001000001090080800100000001d8ff8080019fd770b5740d0000"
)


def test_the_layout_of_the_header():
    content = encode(spread_out(20, 30, 50.0)).tobytes()
    magic, version, _, _, out, into, far, models, _, checksum = struct.unpack_from("<4sBbbIIIIII", content)
    assert (magic, version, out, into) == (b"HFLE", 2, 20, 30) and OVERHEAD_BYTES == 31
    assert far == len(spread_out(20, 30, 50.0).far_codes) > 0
    assert OVERHEAD_BYTES + 8 * far + models <= len(content) and (len(content) - OVERHEAD_BYTES - models) % 2 == 0
    assert checksum == zlib.crc32(content[OVERHEAD_BYTES:], zlib.crc32(content[:CHECKSUM]))


# What is refused

SMALL = spread_out(6, 9, 3.0)
BYTES = encode(SMALL).tobytes()


def read(content: bytes, shape: tuple[int, int] = (6, 9)) -> CodedMatrix:
    return decode(np.frombuffer(content, np.uint8), shape)


def with_checksum(content: bytes) -> bytes:
    """With the checksum of all bytes put right, as someone would who changes a file on purpose."""
    crc = zlib.crc32(content[OVERHEAD_BYTES:], zlib.crc32(content[:CHECKSUM]))
    return content[:CHECKSUM] + struct.pack("<I", crc) + content[OVERHEAD_BYTES:]


def in_lanes() -> bytes:
    with mock.patch.object(coder, "BYTES_PER_LANE", 12):
        return encode(SMALL).tobytes()


EACH_CONTENT = pytest.mark.parametrize("content", [BYTES, in_lanes()], ids=["one-lane", "lanes"])


def changed(content: bytes, position: int, change: int) -> bytes:
    return content[:position] + bytes([content[position] ^ change]) + content[position + 1 :]


def test_there_are_lanes_to_spoil():
    assert read(in_lanes()).checksum == SMALL.checksum and in_lanes() != BYTES


@EACH_CONTENT
def test_every_flipped_bit_is_refused(content):
    for position in range(len(content)):
        for bit in range(8):
            with pytest.raises(MalformedCode):
                read(changed(content, position, 1 << bit))


@EACH_CONTENT
def test_everything_cut_or_longer_is_refused(content):
    for length in range(len(content)):
        with pytest.raises(MalformedCode):
            read(content[:length])
        with pytest.raises(MalformedCode):
            read(content[length:] + content)
    for more in (b"\0", b"\0\0\0\0", b"\1\2\3\4", content):
        with pytest.raises(MalformedCode, match="checksum does not match"):
            read(content + more)


@EACH_CONTENT
@pytest.mark.parametrize("change", [1, 0x80, 0xFF])
def test_a_change_with_the_checksum_put_right_makes_no_other_matrix(content, change):
    refused = 0
    for position in [*range(CHECKSUM), *range(OVERHEAD_BYTES, len(content))]:
        try:
            found = read(with_checksum(changed(content, position, change)))
        except MalformedCode:
            refused += 1
        else:
            assert same(found, SMALL)
    assert refused > 0.9 * (len(content) - 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"it is no coded matrix: it begins with b''"),
        (BYTES[:30], r"it is no coded matrix"),
        (b"PK\3\4" + BYTES[4:], r"it is no coded matrix: it begins with b'PK"),
        (b"ELFH" + BYTES[4:], r"its bytes are in another machine's order: it begins with b'ELFH'"),
        (BYTES[:4] + b"\3" + BYTES[5:], r"it has version 3 of the coding, and this release reads up to 2"),
        (with_checksum(BYTES[:4] + b"\3" + BYTES[5:]), r"it has version 3 of the coding"),
        (BYTES[:-1], r"its checksum does not match, so it was cut or changed"),
    ],
    ids=["empty", "half-a-header", "foreign", "byte-order", "newer", "newer-with-checksum", "cut"],
)
def test_what_it_says(content, message):
    with pytest.raises(MalformedCode, match=message):
        read(content)


@pytest.mark.parametrize("shape", [(9, 6), (6, 8), (7, 9), (1, 54)], ids=str)
def test_another_shape(shape):
    with pytest.raises(MalformedCode, match=r"it is a matrix \[6, 9\], and not \[\d, \d+\]"):
        read(BYTES, shape)


def header_with(**fields: int) -> bytes:
    names = ("magic", "version", "row_base", "column_base", "out", "in", "far", "models", "codes")
    values = dict(zip(names, struct.unpack_from("<4sBbbIIIII", BYTES), strict=True)) | fields
    return with_checksum(struct.pack("<4sBbbIIIII", *values.values()) + BYTES[CHECKSUM:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"far": 2**32 - 1}, "shorter than its header says"),
        ({"models": 2**32 - 1}, "shorter than its header says"),
        ({"far": 2**31, "models": 2**31}, "shorter than its header says"),
        ({"out": 2**32 - 1, "in": 2**32 - 1}, r"it is a matrix \[4294967295, 4294967295\]"),
        ({"codes": 0}, "has another checksum: the coder here works otherwise"),
        ({"row_base": 127}, "a step beyond all numbers"),
        ({"column_base": 97}, "a step beyond all numbers"),
    ],
    ids=str,
)
def test_headers_that_lie_take_no_memory(fields, message):
    content = header_with(**fields)
    tracemalloc.start()
    try:
        with pytest.raises(MalformedCode, match=message):
            read(content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda models: models[:3] + b"\0" + models[4:], "add up to"),
        (lambda models: b"\xff\xff\x03" + models[3:], "symbols, where 256 is the most"),
        (lambda models: b"\0" * len(models), "have an empty model"),
        (lambda models: models[: read_frequencies(models, 0)[1]], "it has too few models"),
        (lambda models: b"\x80" * len(models), "ends in the middle of a number"),
    ],
    ids=["sum", "too-many-symbols", "empty", "cut", "endless-number"],
)
def test_models_that_are_none(spoil: Callable[[bytes], bytes], message):
    (far, models) = struct.unpack_from("<II", BYTES, 15)
    start = OVERHEAD_BYTES + 8 * far
    spoilt = spoil(BYTES[start : start + models])
    header = BYTES[:19] + struct.pack("<I", len(spoilt)) + BYTES[23:OVERHEAD_BYTES]
    with pytest.raises(MalformedCode, match=message):
        read(with_checksum(header + BYTES[OVERHEAD_BYTES:start] + spoilt + BYTES[start + models :]))


@pytest.mark.parametrize(
    ("positions", "message"),
    [([3, 12], r"a code has the place 12 in a matrix \[3, 4\]"), ([7, 3], "do not rise"), ([3, 3], "do not rise")],
    ids=["outside", "falling", "twice"],
)
def test_places_of_far_codes(positions, message):
    content = encode(matrix_of([[0, 0, 0, 500], [0, 1, 0, -500], [0, 0, 2, 0]])).tobytes()
    assert struct.unpack_from("<II", content, OVERHEAD_BYTES) == (3, 7)
    places = struct.pack("<II", *positions)
    with pytest.raises(MalformedCode, match=message):
        read(with_checksum(content[:OVERHEAD_BYTES] + places + content[OVERHEAD_BYTES + 8 :]), (3, 4))
