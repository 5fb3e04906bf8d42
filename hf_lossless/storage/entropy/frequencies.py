"""Static models of symbols: the expected frequency of each symbol, as whole numbers that add up to 2^14.

A model is stored as

    number of symbols (a varint; 0: there are none)   first symbol, int16   one varint for each symbol

with varints of seven bits a byte, least first (LEB128). Frequencies that do not add up are refused when they are read.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class MalformedCode(ValueError):
    """Coded bytes cannot be decoded; the message says what is wrong, and the caller adds the tensor's name."""


TOTAL = 2**14
"""The sum of the frequencies. A finer resolution would take more bytes than it saves: with 2^14, the codes of MiniLM
take 0.02 % more than their entropy."""

_LARGEST_ALPHABET = 256


@dataclass(frozen=True)
class Frequencies:
    """Expected frequencies of the symbols `first`, `first + 1`, ...

    Attributes:
        first: The least symbol.
        weights: int64 [symbols], which add up to `TOTAL`; empty where no symbol is coded.
    """

    first: int
    weights: NDArray[np.int64]

    @classmethod
    def of(cls, first: int, counts: NDArray[np.int64]) -> "Frequencies":
        """Computes frequencies from counts; every symbol that occurs has at least 1.

        Args:
            first: The symbol of the first count.
            counts: [symbols], at most 256.

        Example:
            >>> Frequencies.of(-2, np.array([0, 1, 3, 0])).weights.tolist()
            [4096, 12288]
        """
        (present,) = counts.nonzero()
        if not len(present):
            return cls(0, counts[:0])
        first, counts = first + int(present[0]), counts[present[0] : present[-1] + 1]
        shares = counts * (TOTAL / counts.sum())
        weights = np.where(counts > 0, np.maximum(1, np.floor(shares)), 0).astype(np.int64)
        missing = TOTAL - int(weights.sum())
        weights[np.argsort(weights - shares, kind="stable")[: max(0, missing)]] += 1  # those that rounding lowered most
        for _ in range(-missing):
            weights[weights.argmax()] -= 1
        return cls(first, weights)

    @property
    def takes_bits(self) -> bool:
        """Returns whether a symbol takes any bits: the only symbol of a model takes none."""
        return len(self.weights) > 1

    @property
    def starts(self) -> NDArray[np.int64]:
        """Returns the sum of the frequencies before each symbol, int64 [symbols]."""
        before: NDArray[np.int64] = self.weights.cumsum() - self.weights
        return before

    def check(self, size: int) -> None:
        """Raises MalformedCode where there are symbols, and the model has none."""
        if size and not len(self.weights):
            raise MalformedCode(f"{size} symbols have an empty model")

    def to_bytes(self) -> bytes:
        """Serialises the model."""
        if not len(self.weights):
            return _varint(0)
        first = int(self.first).to_bytes(2, "little", signed=True)
        return _varint(len(self.weights)) + first + b"".join(_varint(int(weight)) for weight in self.weights)


Segment = tuple[NDArray[np.int32], Frequencies]
"""Consecutive symbols, and their model."""


def entropy_bytes(counts: NDArray[np.int64]) -> int:
    """Computes the bytes of symbols with these counts, coded at the entropy of their own frequencies."""
    present = counts[counts > 0]
    return math.ceil(-(present * np.log2(present / counts.sum())).sum() / 8) if len(present) else 0


def read_frequencies(stored: bytes, start: int) -> tuple[Frequencies, int]:
    """Reads the model that begins at byte `start`, and returns it with the position of the next.

    Raises:
        MalformedCode: The model ends too early, has too many symbols, or its frequencies do not add up.
    """
    size, start = _read_varint(stored, start)
    if size == 0:
        return Frequencies(0, np.zeros(0, np.int64)), start
    if size > _LARGEST_ALPHABET:
        raise MalformedCode(f"a model of {size} symbols, where {_LARGEST_ALPHABET} is the most")
    first = int.from_bytes(stored[start : start + 2], "little", signed=True)
    start += 2
    weights = np.zeros(size, np.int64)
    for index in range(size):
        weights[index], start = _read_varint(stored, start)
    if weights.sum() != TOTAL:
        raise MalformedCode(f"the frequencies of a model add up to {weights.sum()}, not to {TOTAL}")
    return Frequencies(first, weights), start


def _varint(value: int) -> bytes:
    parts = []
    while value >= 128:
        parts.append(value % 128 + 128)
        value //= 128
    return bytes([*parts, value])


def _read_varint(stored: bytes, start: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if start >= len(stored) or shift > 28:
            raise MalformedCode("a model ends in the middle of a number")
        value |= (stored[start] & 127) << shift
        shift += 7
        start += 1
        if stored[start - 1] < 128:
            return value, start
