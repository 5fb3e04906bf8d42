"""The loops of the coder with lanes, in numpy: range asymmetric numeral systems (Duda et al. 2015) on whole numbers.

A lane's state x lies in 2^16 ... 2^32 - 1. With f the frequency of a symbol, F the sum of those before it, and 2^14
the sum of all,

    encode    while x >= 2^18 f: emit the low 16 bits of x, x = x // 2^16
              x = 2^14 (x // f) + F + x mod f
    decode    slot = x mod 2^14;  the symbol is the one with F <= slot < F + f
              x = f (x // 2^14) + slot - F
              if x < 2^16: x = 2^16 x + the next word

Symbol i belongs to lane i mod L, and all lanes read from one sequence of words (Giesen 2014, "Interleaved entropy
coders"), so that one call of numpy decodes L consecutive symbols. `compiled` has the same decoder for numba. All
arithmetic is on whole numbers, so that all machines write the same bytes.
"""

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from hf_lossless.storage.entropy.frequencies import TOTAL, Frequencies

LOW = 2**16
"""The least state, and the number of values of a word."""

TOTAL_BITS = TOTAL.bit_length() - 1

_FEW_LANES = 24
"""With fewer lanes, a Python loop over single symbols is as fast as calls of numpy."""

_ROWS = 256
"""Rows of symbols whose slots are collected before they are looked up at once."""


def encode_lanes(
    weights: NDArray[np.uint16], starts: NDArray[np.uint16], states: NDArray[np.int64]
) -> NDArray[np.uint16]:
    """Encodes symbols from the last to the first, and returns the words in decoding order.

    Args:
        weights: f of each symbol, [symbols].
        starts: F of each symbol, [symbols].
        states: x of each lane, [lanes]; updated in place.
    """
    lanes = len(states)
    words = np.empty(len(weights), np.uint16)  # a symbol emits at most one
    first = len(words)
    for begin in reversed(range(0, len(weights), lanes)):
        f, before = weights[begin : begin + lanes].astype(np.int64), starts[begin : begin + lanes]
        x = states[: len(f)]
        full = (x >= f << 32 - TOTAL_BITS).nonzero()[0]
        if len(full):
            emitting = x[full]
            first, last = first - len(full), first
            words[first:last] = emitting % LOW
            x[full] = emitting // LOW
        x += (x // f) * (TOTAL - f) + before  # 2^14 (x // f) + x mod f = x + (2^14 - f) (x // f)
    return words[first:].copy()


def encode_tail(
    weights: NDArray[np.uint16], starts: NDArray[np.uint16], num_words: int
) -> tuple[int, NDArray[np.uint16]]:
    """Encodes as many of the last symbols as fit into `num_words` words, with a single state.

    Returns:
        The number of symbols that are left, and the words: the state, low 16 bits first, then the emitted words in
        decoding order, then zeros.
    """
    state, emitted, left = LOW, list[int](), len(weights)
    while left:
        f, before = int(weights[left - 1]), int(starts[left - 1])
        if state >= f << 32 - TOTAL_BITS:
            if len(emitted) == num_words - 2:
                break
            emitted.append(state % LOW)
            state //= LOW
        state = state // f * TOTAL + before + state % f
        left -= 1
    words = np.zeros(num_words, np.uint16)
    words[: len(emitted) + 2] = [state % LOW, state // LOW, *reversed(emitted)]
    return left, words


def decode_lanes(
    words: NDArray[np.uint16],
    position: int,
    states: NDArray[np.uint32],
    lane: int,
    frequencies: Frequencies,
    symbols: NDArray[np.uint8],
) -> int:
    """Decodes symbols of one model.

    Args:
        words: All words of the stream, [words].
        position: Index of the next word.
        states: x of each lane, [lanes]; updated in place.
        lane: Lane of the first symbol.
        frequencies: The model of the symbols.
        symbols: Output array for the symbols, modulo 256.

    Returns:
        Index of the next word; -1 where there were too few words.
    """
    if len(states) < _FEW_LANES:
        return _decode_one_by_one(words, position, states, lane, frequencies, symbols)
    by_slot = _BySlot(frequencies)
    done, lanes = 0, len(states)
    x = states.astype(np.int64)  # the dtype of numpy's indices
    while done < len(symbols) and position >= 0:
        left = len(symbols) - done
        # The rest of a row that another model began, then many whole rows at a time, then the beginning of a row.
        rows, width = (
            (min(_ROWS, left // lanes), lanes) if lane == 0 and left >= lanes else (1, min(lanes - lane, left))
        )
        slots = np.empty((rows, width), np.int64)
        position = _decode_rows(words, position, x[lane : lane + width], by_slot, slots)
        by_slot.symbols.take(slots.ravel(), out=symbols[done : done + slots.size], mode="clip")
        done += slots.size
        lane = (lane + width) % lanes
    states[:] = x
    return position


class _BySlot:
    """A model's symbols, frequencies and their sums, by slot."""

    def __init__(self, frequencies: Frequencies) -> None:
        places = np.repeat(np.arange(len(frequencies.weights)), frequencies.weights)
        self.symbols = (places + frequencies.first).astype(np.uint8)
        self.weights = frequencies.weights[places]
        self.offsets = np.arange(TOTAL) - frequencies.starts[places]


def _decode_rows(
    words: NDArray[np.uint16], position: int, x: NDArray[np.int64], by_slot: _BySlot, slots: NDArray[np.int64]
) -> int:
    """Decodes rows of one symbol a lane and stores their slots [rows, lanes]; rows are short, so each call counts."""
    weight, offset = np.empty_like(x), np.empty_like(x)
    take_weight, take_offset = by_slot.weights.take, by_slot.offsets.take
    for row in slots:
        np.bitwise_and(x, TOTAL - 1, row)
        take_weight(row, None, weight, "clip")  # "clip" writes in place, which the default does not
        take_offset(row, None, offset, "clip")
        np.right_shift(x, TOTAL_BITS, x)
        np.multiply(x, weight, x)
        np.add(x, offset, x)
        short = (x < LOW).nonzero()[0]
        if len(short):
            end = position + len(short)
            if end > len(words):
                return -1
            x[short] = (x.take(short) << 16) | words[position:end]
            position = end
    return position


def _decode_one_by_one(
    words: NDArray[np.uint16],
    position: int,
    states: NDArray[np.uint32],
    lane: int,
    frequencies: Frequencies,
    symbols: NDArray[np.uint8],
) -> int:
    weights, starts, first = frequencies.weights.tolist(), frequencies.starts.tolist(), frequencies.first
    x, found, following = states.tolist(), bytearray(len(symbols)), words[position : position + len(symbols)].tolist()
    used = 0
    for index in range(len(found)):
        state = x[lane]
        slot = state % TOTAL
        place = bisect_right(starts, slot) - 1
        state = weights[place] * (state // TOTAL) + slot - starts[place]
        if state < LOW:
            if used == len(following):
                return -1
            state = state * LOW + following[used]
            used += 1
        x[lane] = state
        found[index] = (first + place) % 256
        lane = lane + 1 if lane + 1 < len(x) else 0
    states[:] = x
    symbols[:] = np.frombuffer(found, np.uint8)
    return position + used
