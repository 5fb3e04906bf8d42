"""The decoder with lanes, compiled by numba: the same symbols as `kernels.decode_lanes`, many times as fast.

It releases Python's lock, so that layers can be decoded in threads. It is compiled when this module is imported, which
takes half a second; numba caches the machine code beside this file, in the user's cache directory, or in
NUMBA_CACHE_DIR. Where none of these is writable, each process compiles anew.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hf_lossless.storage.entropy.frequencies import Frequencies
from hf_lossless.storage.entropy.kernels import LOW, TOTAL_BITS

_WORD = np.uint32(16)
_LOW = np.uint32(LOW)
_BITS = np.uint32(TOTAL_BITS)
_SLOT = np.uint32(2**TOTAL_BITS - 1)

_SIGNATURE = "int64(uint16[::1], int64, uint32[::1], int64, uint8[::1], uint32[::1], uint32[::1], uint8, uint8[::1])"


def decode_lanes(
    words: NDArray[np.uint16],
    position: int,
    states: NDArray[np.uint32],
    lane: int,
    frequencies: Frequencies,
    symbols: NDArray[np.uint8],
) -> int:
    """Decodes symbols of one model, see `kernels.decode_lanes`."""
    places = np.repeat(np.arange(len(frequencies.weights), dtype=np.uint8), frequencies.weights)
    weights, starts = frequencies.weights.astype(np.uint32), frequencies.starts.astype(np.uint32)
    first = np.uint8(frequencies.first % 256)
    return int(_decode(words, position, states, lane, places, weights, starts, first, symbols))


def _loop(
    words: Any, position: Any, states: Any, lane: Any, places: Any, weights: Any, starts: Any, first: Any, symbols: Any
) -> Any:
    for index in range(len(symbols)):
        x = states[lane]
        slot = x & _SLOT
        place = places[slot]
        symbols[index] = place + first
        x = weights[place] * (x >> _BITS) + slot - starts[place]
        if x < _LOW:
            if position == len(words):
                return -1
            x = (x << _WORD) | words[position]
            position += 1
        states[lane] = x
        lane += 1
        if lane == len(states):
            lane = 0
    return position


def _compile() -> Callable[..., Any]:
    try:
        compiled: Callable[..., Any] = numba.njit(_SIGNATURE, nogil=True, cache=True)(_loop)
    except RuntimeError:  # no cache directory is writable
        compiled = numba.njit(_SIGNATURE, nogil=True)(_loop)
    return compiled


_decode = _compile()
