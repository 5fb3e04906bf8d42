"""Encodes a matrix with a step per row and column, `W[k, i] = row_steps[k] column_steps[i] code[k, i]`, as bytes.

    magic            4 bytes   b"HFLE"
    version          uint8     of the stream, 1 or 2
    row base         int8      of the row steps, see `steps`
    column base      int8
    out, in          uint32    shape of the matrix
    far              uint32    number of codes that do not fit into a byte
    models           uint32    bytes of the models
    codes' checksum  uint32    CRC-32 of the decoded matrix
    checksum         uint32    CRC-32 of everything before and after it
    far positions    uint32 each, in the matrix laid out row by row
    far codes        int32 each
    models           see `frequencies`: of row steps, column steps, row levels, column levels, and of each model number
    stream           the same in that order; see `coder`, or `first_version` for version 1

All numbers are little-endian. Codes from -127 to 127 are entropy-coded; a larger one is coded as 0 and listed as far.
Every tensor is self-contained, so that layers can be read separately and in parallel.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_lossless.storage.entropy.coder import Kernel, SegmentDecoder, choose_kernel, encode_segments
from hf_lossless.storage.entropy.first_version import FirstVersionDecoder
from hf_lossless.storage.entropy.frequencies import Frequencies, MalformedCode, Segment, read_frequencies
from hf_lossless.storage.entropy.levels import LARGEST_LEVEL, Blocks, Levels, best_levels, model_counts
from hf_lossless.storage.entropy.steps import LARGEST_BASE, decode_steps, encode_steps

LARGEST_NEAR = 127
"""The largest |code| that a byte holds."""

LARGEST_CODE = 2**24
"""The largest |code| at all: larger whole numbers are not exact in float32."""

_MAGIC = b"HFLE"
_VERSION = 2
"""Version of the streams that are written; version 1 can be read."""

_HEADER = struct.Struct("<4sBbbIIIII")
_CHECKSUM = struct.Struct("<I")
OVERHEAD_BYTES = _HEADER.size + _CHECKSUM.size
"""Bytes of a coded matrix without its far codes, models and stream."""


@dataclass(frozen=True)
class CodedMatrix:
    """Codes and steps of a matrix in the form that the run time uses.

    Attributes:
        codes: int8 [out, in]; 0 where the code is far.
        row_steps: float32 [out].
        column_steps: float32 [in].
        far_positions: int64 [far], ascending, of codes that do not fit into a byte, in the matrix laid out row by row.
        far_codes: int32 [far].
    """

    codes: NDArray[np.int8]
    row_steps: NDArray[np.float32]
    column_steps: NDArray[np.float32]
    far_positions: NDArray[np.int64]
    far_codes: NDArray[np.int32]

    @classmethod
    def of(
        cls, codes: NDArray[np.int32], row_steps: NDArray[np.float32], column_steps: NDArray[np.float32]
    ) -> "CodedMatrix":
        """Splits integer codes [out, in] into near and far ones; steps must be values of `steps.decode_steps`."""
        codes = np.ascontiguousarray(codes)
        far = np.abs(codes) > LARGEST_NEAR
        positions = np.flatnonzero(far)
        near = np.where(far, 0, codes).astype(np.int8)
        return cls(near, row_steps, column_steps, positions, codes.ravel()[positions].astype(np.int32))

    @property
    def checksum(self) -> int:
        """Computes the CRC-32 of codes and steps."""
        parts = (self.codes, self.far_positions.astype("<i8"), self.far_codes.astype("<i4"))
        crc = 0
        for part in (*parts, self.row_steps.astype("<f4"), self.column_steps.astype("<f4")):
            crc = zlib.crc32(np.ascontiguousarray(part).data, crc)
        return crc


def encode(matrix: CodedMatrix) -> NDArray[np.uint8]:
    """Encodes a matrix as bytes; equal matrices give equal bytes.

    Example:
        >>> codes = np.array([[0, 1, -1], [2, 300, 0]], dtype=np.int32)
        >>> matrix = CodedMatrix.of(codes, np.float32([1, 2]), np.float32([1, 0.5, 1]))
        >>> decode(encode(matrix), (2, 3)).far_codes
        array([300], dtype=int32)
    """
    levels, _ = best_levels(matrix.codes)
    (rows, row_base), (columns, column_base) = encode_steps(matrix.row_steps), encode_steps(matrix.column_steps)
    segments: list[Segment] = [_bytes_segment(part) for part in (rows, columns, levels.rows, levels.columns)]
    blocks = Blocks.of(levels)
    ordered = matrix.codes[blocks.row_order][:, blocks.column_order]
    for model, counts in enumerate(model_counts(matrix.codes, levels)):
        parts = [ordered[place].ravel() for place in blocks.of_model(model)]
        symbols = np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
        segments.append((symbols, Frequencies.of(-128, counts)))
    models = b"".join(frequencies.to_bytes() for _, frequencies in segments)
    num_rows, num_columns = matrix.codes.shape
    header = _HEADER.pack(
        *(_MAGIC, _VERSION, row_base, column_base, num_rows, num_columns),
        *(len(matrix.far_codes), len(models), matrix.checksum),
    )
    far = matrix.far_positions.astype("<u4").tobytes() + matrix.far_codes.astype("<i4").tobytes()
    body = far + models + encode_segments(segments)
    checksum = _CHECKSUM.pack(_crc(header, body))
    return np.frombuffer(header + checksum + body, np.uint8).copy()


def decode(stored: NDArray[np.uint8], shape: tuple[int, int], kernel: Kernel | None = None) -> CodedMatrix:
    """Decodes the bytes of a matrix.

    Args:
        stored: The bytes, as `encode` gives them.
        shape: Expected shape (out, in) of the matrix.
        kernel: The decoder of streams with lanes; None: chosen for a single matrix of this size.

    Raises:
        MalformedCode: The bytes were cut or changed, are of a newer version or another shape, or are no coded matrix.
        ConfigurationError: The bytes are of version 1, and the library that reads it is not installed.
    """
    header, body = _checked(stored.tobytes(), shape)
    far_end = 8 * header.num_far
    far_positions = np.frombuffer(body, "<u4", header.num_far).astype(np.int64)
    far_codes = np.frombuffer(body, "<i4", header.num_far, 4 * header.num_far).astype(np.int32)
    if header.num_far and far_positions.max() >= shape[0] * shape[1]:
        raise MalformedCode(f"a code has the place {far_positions.max()} in a matrix {list(shape)}")
    if (np.diff(far_positions) <= 0).any():
        raise MalformedCode("the places of its far codes do not rise")
    models = _read_models(body[far_end : far_end + header.model_bytes])
    stream = body[far_end + header.model_bytes :]
    decoder: SegmentDecoder | FirstVersionDecoder
    if header.version == 1:
        decoder = FirstVersionDecoder(stream)
    else:
        decoder = SegmentDecoder(stream, kernel or choose_kernel(shape[0] * shape[1]))
    rows, columns, row_levels, column_levels = (decoder.decode(size, next(models)) for size in (*shape, *shape))
    codes = _decode_codes(Levels(row_levels.astype(np.int32), column_levels.astype(np.int32)), decoder, models)
    decoder.finish()
    row_steps = decode_steps(rows, header.row_base)
    column_steps = decode_steps(columns, header.column_base)
    matrix = CodedMatrix(codes, row_steps, column_steps, far_positions, far_codes)
    if matrix.checksum != header.codes_checksum:
        raise MalformedCode("what it decodes to has another checksum: the coder here works otherwise")
    return matrix


class _Header(NamedTuple):
    magic: bytes
    version: int
    row_base: int
    column_base: int
    num_rows: int
    num_columns: int
    num_far: int
    model_bytes: int
    codes_checksum: int


def _checked(content: bytes, shape: tuple[int, int]) -> tuple[_Header, bytes]:
    """Splits bytes into header and body, after all checks that need no decoding."""
    start = _HEADER.size + _CHECKSUM.size
    if len(content) < start or content[: len(_MAGIC)] != _MAGIC:
        backwards = content[: len(_MAGIC)] == _MAGIC[::-1]
        what = "its bytes are in another machine's order" if backwards else "it is no coded matrix"
        raise MalformedCode(f"{what}: it begins with {content[: len(_MAGIC)]!r}")
    header, body = _Header(*_HEADER.unpack_from(content)), content[start:]
    if not 1 <= header.version <= _VERSION:
        raise MalformedCode(f"it has version {header.version} of the coding, and this release reads up to {_VERSION}")
    if _CHECKSUM.unpack_from(content, _HEADER.size) != (_crc(content[: _HEADER.size], body),):
        raise MalformedCode("its checksum does not match, so it was cut or changed")
    if (header.num_rows, header.num_columns) != shape:
        raise MalformedCode(f"it is a matrix {[header.num_rows, header.num_columns]}, and not {list(shape)}")
    if 8 * header.num_far + header.model_bytes > len(body):
        raise MalformedCode("it is shorter than its header says")
    if max(header.row_base, header.column_base) > LARGEST_BASE:
        raise MalformedCode("it has a step beyond all numbers of float32")
    return header, body


def _read_models(stored: bytes) -> Iterator[Frequencies]:
    """Yields the models in order."""
    start = 0
    while start < len(stored):
        frequencies, start = read_frequencies(stored, start)
        yield frequencies
    raise MalformedCode("it has too few models")


def _decode_codes(
    levels: Levels, decoder: SegmentDecoder | FirstVersionDecoder, models: Iterator[Frequencies]
) -> NDArray[np.int8]:
    for side in (levels.rows, levels.columns):
        if side.max() > LARGEST_LEVEL:
            raise MalformedCode(f"it has levels from {side.min()} to {side.max()}")
    blocks = Blocks.of(levels)
    ordered = np.empty((len(levels.rows), len(levels.columns)), np.int8)
    for model in range(levels.num_models):
        places = list(blocks.of_model(model))
        shapes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in places]
        sizes = [num_rows * num_columns for num_rows, num_columns in shapes]
        symbols = decoder.decode(sum(sizes), next(models)).view(np.int8)
        for place, shape, part in zip(places, shapes, np.split(symbols, np.cumsum(sizes))[:-1], strict=True):
            ordered[place] = part.reshape(shape)
    # `take` leaves the rows contiguous in memory; indexing with brackets would not.
    return ordered.take(np.argsort(blocks.row_order), 0).take(np.argsort(blocks.column_order), 1)


def _bytes_segment(symbols: NDArray[np.integer]) -> Segment:
    return symbols.astype(np.int32), Frequencies.of(0, np.bincount(symbols))


def _crc(header: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(header))
