"""The decoder of version 1, which is no longer written: a single state, decoded by the library constriction."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.entropy.frequencies import TOTAL, Frequencies, MalformedCode


def require_constriction() -> Any:
    """Imports the library constriction.

    Raises:
        ConfigurationError: It is not installed; the message says how to install it.
    """
    try:
        import constriction  # an extra, and only streams of version 1 need it
    except ImportError as error:
        raise ConfigurationError(
            "entropy-coded layers that were written up to format version 5 need the library constriction, which is not "
            "installed. Install it with: pip install 'hf-lossless[entropy]'"
        ) from error
    return constriction


class FirstVersionDecoder:
    """Decodes the segments of a stream of version 1 in order."""

    def __init__(self, stream: bytes) -> None:
        """Reads a stream of little-endian 32-bit words.

        Raises:
            MalformedCode: The stream is no whole number of words, or ends in a word that no stream ends in.
            ConfigurationError: The library is not installed.
        """
        library = require_constriction()
        if len(stream) % 4:
            raise MalformedCode(f"a stream of {len(stream)} bytes, which is no whole number of words")
        words = np.frombuffer(stream, "<u4").astype(np.uint32)
        try:
            self._coder = library.stream.stack.AnsCoder(words)
        except ValueError as error:
            raise MalformedCode(f"a stream that cannot be read: {error}") from error

    def decode(self, size: int, frequencies: Frequencies) -> NDArray[np.uint8]:
        """Decodes the next `size` symbols, modulo 256.

        Raises:
            MalformedCode: The symbols have no model.
        """
        frequencies.check(size)
        if not size or not frequencies.takes_bits:
            return np.full(size, frequencies.first % 256, np.uint8)
        symbols: NDArray[np.int32] = self._coder.decode(_model(frequencies), size)
        return (symbols + frequencies.first).astype(np.uint8)

    def finish(self) -> None:
        """Raises MalformedCode where the stream holds more than was decoded."""
        if not self._coder.is_empty():
            raise MalformedCode("a stream that does not end where its symbols do")


def _model(frequencies: Frequencies) -> Any:
    # Whole numbers below 2^24 are exact in float32, and with a sum of 2^14 the probabilities are exact as well.
    library = require_constriction()
    return library.stream.model.Categorical((frequencies.weights / TOTAL).astype(np.float32), perfect=False)
