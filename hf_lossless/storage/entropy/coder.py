"""The entropy coder: one stream whose symbols are decoded in parallel lanes.

    lanes     uint16           L
    symbols   uint32           number of symbols in the lanes; the others follow in the tail
    states    uint32 [lanes]   initial states of the lanes
    words     uint16           the words that the lanes read, see `kernels`

All numbers are little-endian; where no symbol takes bits, the stream is empty.

A lane ends in the initial state of its encoder. This may be any of 2^16 ... 2^17 - 1, so its low 16 bits have room for
a word: these words of all lanes, one after the other, are the stream of one more lane, the tail, which holds the last
symbols. A lane so takes 1 byte beside its symbols instead of 3, and a layer can have three times as many lanes.
"""

import struct
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hf_lossless.storage.entropy import kernels
from hf_lossless.storage.entropy.frequencies import Frequencies, MalformedCode, Segment
from hf_lossless.storage.entropy.kernels import LOW, TOTAL_BITS

_HEADER = struct.Struct("<HI")

BYTES_PER_LANE = 1500
"""Bytes of a stream per lane, so that lanes take less than 0.1 % of it."""

_MOST_LANES = 2**16 - 1

COMPILED_FROM = 2**23
"""Number of symbols from which numba pays: its import takes half a second, in which numpy decodes about as many."""

_PARTS_OF_A_BIT = 256

Kernel = Callable[
    [NDArray[np.uint16], int, NDArray[np.uint32], int, Frequencies, NDArray[np.uint8]],
    int,
]
"""A function that decodes symbols of one model, see `kernels.decode_lanes`."""


def encode_segments(segments: Sequence[Segment]) -> bytes:
    """Encodes all segments as one stream; the bytes are the same on every machine."""
    coded = [(symbols - model.first, model) for symbols, model in segments if model.takes_bits and len(symbols)]
    if not coded:
        return b""
    weights = np.concatenate([model.weights.astype(np.uint16)[places] for places, model in coded])
    starts = np.concatenate([model.starts.astype(np.uint16)[places] for places, model in coded])
    lanes = _number_of_lanes(coded)
    num_symbols, rooms = len(weights), np.zeros(lanes, np.uint16)
    if lanes > 1:
        num_symbols, rooms = kernels.encode_tail(weights, starts, lanes)
    states = LOW + rooms.astype(np.int64)
    words = kernels.encode_lanes(weights[:num_symbols], starts[:num_symbols], states)
    return _HEADER.pack(lanes, num_symbols) + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


class SegmentDecoder:
    """Decodes the segments of a stream in order."""

    def __init__(self, stream: bytes, kernel: Kernel = kernels.decode_lanes) -> None:
        """Reads the header of a stream.

        Raises:
            MalformedCode: The stream is shorter than its lanes, or a lane has an impossible initial state.
        """
        lanes, self._left = _HEADER.unpack_from(stream.ljust(_HEADER.size, b"\0"))
        end = _HEADER.size + 4 * lanes
        if stream and (lanes == 0 or len(stream) < end or len(stream) % 2):
            raise MalformedCode(f"a stream of {len(stream)} bytes cannot have {lanes} lanes")
        self._states = np.frombuffer(stream[_HEADER.size : end], "<u4").astype(np.uint32)
        self._words = np.frombuffer(stream[end:], "<u2").astype(np.uint16)
        if (self._states < LOW).any():
            raise MalformedCode(f"a lane begins in the state {self._states.min()}, and {LOW} is the least there is")
        self._position = self._lane = 0
        self._in_tail = False
        self._kernel = kernel

    def decode(self, size: int, frequencies: Frequencies) -> NDArray[np.uint8]:
        """Decodes the next `size` symbols, modulo 256.

        Raises:
            MalformedCode: The symbols have no model, or the stream ends too early.
        """
        frequencies.check(size)
        if not size or not frequencies.takes_bits:
            return np.full(size, frequencies.first % 256, np.uint8)
        symbols = np.empty(size, np.uint8)
        done = 0
        while done < size:
            if not self._left and not self._in_tail:
                self._enter_tail()
            part = symbols[done : size if self._in_tail else done + self._left]
            self._position = self._kernel(self._words, self._position, self._states, self._lane, frequencies, part)
            if self._position < 0:
                raise MalformedCode("a stream that ends before its symbols do")
            done += len(part)
            self._lane = (self._lane + len(part)) % len(self._states)
            self._left -= 0 if self._in_tail else len(part)
        return symbols

    def finish(self) -> None:
        """Raises MalformedCode where the stream holds more than was decoded."""
        if len(self._states) > 1 and not self._left and not self._in_tail:
            self._enter_tail()
        zeros = self._words[self._position :]
        if self._left > 0 or (self._states != LOW).any() or zeros.any() or (len(zeros) and not self._in_tail):
            raise MalformedCode("a stream that does not end where its symbols do")

    def _enter_tail(self) -> None:
        """Continues with the tail: the words that the lanes hold in their final states."""
        rooms, ones = (self._states % LOW).astype(np.uint16), self._states // LOW
        if len(rooms) < 2:
            raise MalformedCode("a stream that ends before its symbols do")
        if (ones != 1).any() or self._position != len(self._words):
            raise MalformedCode("a stream that does not end where its symbols do")
        state = int(rooms[1]) * LOW + int(rooms[0])
        if state < LOW:
            raise MalformedCode(f"its tail begins in the state {state}, and {LOW} is the least there is")
        self._states, self._words = np.array([state], np.uint32), rooms[2:].copy()
        self._position = self._lane = 0
        self._in_tail = True


def _number_of_lanes(coded: Sequence[Segment]) -> int:
    """Computes the number of lanes from the size of the stream, in whole numbers, so that all machines agree."""
    parts = 0
    for places, model in coded:
        counts = np.bincount(places, minlength=len(model.weights))
        for count, weight in zip(counts.tolist(), model.weights.tolist(), strict=True):
            if count:  # log2, rounded to 1/256
                parts += count * (_PARTS_OF_A_BIT * TOTAL_BITS - (weight**_PARTS_OF_A_BIT).bit_length() + 1)
    return min(max(1, parts // (8 * _PARTS_OF_A_BIT * BYTES_PER_LANE)), _MOST_LANES)


def choose_kernel(num_symbols: int) -> Kernel:
    """Chooses numba's decoder where it is installed and pays for so many symbols, else numpy's."""
    if num_symbols >= COMPILED_FROM:
        try:
            from hf_lossless.storage.entropy import compiled
        except ImportError:  # numba is an extra, and may not know this release of numpy
            return kernels.decode_lanes
        return compiled.decode_lanes
    return kernels.decode_lanes
