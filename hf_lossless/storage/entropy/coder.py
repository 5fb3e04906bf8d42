"""The entropy coder: asymmetric numeral systems (Duda et al. 2015) by the library constriction."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.entropy.frequencies import Frequencies, MalformedCode

Segment = tuple[NDArray[np.int32], Frequencies]
"""Symbols that follow each other, and their model."""


def require_coder() -> Any:
    """The library, or an error that says how to get it.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        import constriction  # an extra, and only entropy-coded layers need it
    except ImportError as error:
        raise ConfigurationError(
            "entropy-coded layers need the library constriction, which is not installed. "
            "Install it with: pip install 'hf-lossless[entropy]'"
        ) from error
    return constriction


def entropy_bytes(counts: NDArray[np.int64]) -> int:
    """Bytes that symbols take which occur so often, coded with their own frequencies."""
    present = counts[counts > 0]
    return math.ceil(-(present * np.log2(present / counts.sum())).sum() / 8) if len(present) else 0


def encode_segments(segments: Sequence[Segment]) -> bytes:
    """All segments as one stream of little-endian 32-bit words."""
    library = require_coder()
    coder = library.stream.stack.AnsCoder()
    for symbols, frequencies in reversed(segments):  # it is a stack: what goes in last comes out first
        if _is_coded(frequencies) and len(symbols):
            coder.encode_reverse(np.ascontiguousarray(symbols - frequencies.first, np.int32), _model(frequencies))
    stream: bytes = coder.get_compressed().astype("<u4").tobytes()
    return stream


class SegmentDecoder:
    """Reads segments back, one after the other."""

    def __init__(self, stream: bytes) -> None:
        """Takes what `encode_segments` gave.

        Raises:
            MalformedCode: It is no whole number of words, or ends in a word that no stream ends in.
        """
        library = require_coder()
        if len(stream) % 4:
            raise MalformedCode(f"a stream of {len(stream)} bytes, which is no whole number of words")
        words = np.frombuffer(stream, "<u4").astype(np.uint32)
        try:
            self._coder = library.stream.stack.AnsCoder(words)
        except ValueError as error:
            raise MalformedCode(f"a stream that cannot be read: {error}") from error

    def decode(self, size: int, frequencies: Frequencies) -> NDArray[np.int32]:
        """The next `size` symbols.

        Raises:
            MalformedCode: There is no model for them.
        """
        if not size:
            return np.zeros(0, np.int32)
        if not len(frequencies.weights):
            raise MalformedCode(f"{size} symbols have an empty model")
        if not _is_coded(frequencies):
            return np.full(size, frequencies.first, np.int32)
        symbols: NDArray[np.int32] = self._coder.decode(_model(frequencies), size)
        symbols += frequencies.first
        return symbols

    def finish(self) -> None:
        """Raises MalformedCode where the stream holds more than was read."""
        if not self._coder.is_empty():
            raise MalformedCode("a stream that does not end where its symbols do")


def _is_coded(frequencies: Frequencies) -> bool:
    """Whether symbols take any bits: a single one is known."""
    return len(frequencies.weights) > 1


def _model(frequencies: Frequencies) -> Any:
    # Whole numbers below 2^24 are exact in float32, and a sum of 2^14 leaves nothing to be rounded.
    return require_coder().stream.model.Categorical((frequencies.weights / 2**14).astype(np.float32), perfect=False)
