"""Assigns the weights of a matrix to models: weights of similar mean |code| share one.

The mean |code| differs between rows and between columns, because their steps differ. Row k gets a level a_k, column i a
level b_i, each the logarithm of its mean |code|, and the entry (k, i) is coded with model number a_k + b_i: the product
of the two means. Rows and columns of one level, put side by side, form rectangles, so no model number is stored for a
single weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_lossless.storage.entropy.frequencies import entropy_bytes

_FINEST_OCTAVES = 0.5
_COARSER = (1, 2, 4, 64)
"""Numbers of levels that are merged into one, all tried; 64 leaves a single level."""

LARGEST_LEVEL = 31
"""The largest level of rows and of columns; levels above it are clamped to it."""

_NEGLIGIBLE = 2.0**-8
"""Lower bound of the mean |code| whose logarithm is the level."""

_BYTES_PER_SYMBOL = 1.5
"""Approximate bytes of one more symbol in a model."""

_VALUES = 256


@dataclass(frozen=True)
class Levels:
    """Levels of the rows and of the columns.

    Attributes:
        rows: a, int32 [out], from 0.
        columns: b, int32 [in], from 0.
    """

    rows: NDArray[np.int32]
    columns: NDArray[np.int32]

    @property
    def num_models(self) -> int:
        """Returns the number of model numbers: 0 to the largest sum of levels."""
        return int(self.rows.max()) + int(self.columns.max()) + 1

    def merged(self, factor: int) -> "Levels":
        """Merges each `factor` consecutive levels into one."""
        return Levels(self.rows // factor, self.columns // factor)


@dataclass(frozen=True)
class Blocks:
    """A matrix with rows and columns ordered by level.

    Attributes:
        row_order: Indices of the rows, by level, [out].
        column_order: Indices of the columns, by level, [in].
        row_ends: Where the rows of each level end, [levels + 1], from 0.
        column_ends: The same for columns.
    """

    row_order: NDArray[np.int64]
    column_order: NDArray[np.int64]
    row_ends: NDArray[np.int64]
    column_ends: NDArray[np.int64]

    @classmethod
    def of(cls, levels: Levels) -> "Blocks":
        """Orders the rows and columns of a matrix by level; rows of one level keep their order."""
        orders = [np.argsort(side, kind="stable") for side in (levels.rows, levels.columns)]
        ends = [np.concatenate([[0], np.bincount(side).cumsum()]) for side in (levels.rows, levels.columns)]
        return cls(orders[0], orders[1], ends[0], ends[1])

    def of_model(self, model: int) -> Iterator[tuple[slice, slice]]:
        """Yields the rectangles of the ordered matrix that are coded with a model, by ascending row level."""
        row_levels, column_levels = len(self.row_ends) - 1, len(self.column_ends) - 1
        for level in range(max(0, model - column_levels + 1), min(row_levels, model + 1)):
            other = model - level
            rows = slice(int(self.row_ends[level]), int(self.row_ends[level + 1]))
            columns = slice(int(self.column_ends[other]), int(self.column_ends[other + 1]))
            if rows.stop > rows.start and columns.stop > columns.start:
                yield rows, columns


def best_levels(codes: NDArray[np.int8], share: float = 1.0) -> tuple[Levels, int]:
    """Computes the levels with which the codes of a matrix take the fewest bytes, and these bytes, models included.

    Args:
        codes: int8 [out, in].
        share: Number of rows of the matrix per row of `codes`, where these are a sample.
    """
    magnitudes = np.abs(codes.astype(np.int16))
    finest = Levels(_levels(magnitudes.mean(1)), _levels(magnitudes.mean(0)))
    counts = _counts(codes, finest)  # [row levels, column levels, values]
    choices = []
    for factor in (1, *_COARSER):
        levels = finest.merged(factor)
        choices.append((_coded_bytes(_merged_counts(counts, factor), levels, share), factor))
    num_bytes, factor = min(choices)
    return finest.merged(factor), num_bytes


def model_counts(codes: NDArray[np.int8], levels: Levels) -> NDArray[np.int64]:
    """Counts how often each code from -128 to 127 occurs in each model, int64 [models, 256]."""
    return _by_model(_counts(codes, levels))


def _levels(means: NDArray[np.floating]) -> NDArray[np.int32]:
    levels = np.rint(np.log2(np.maximum(means, _NEGLIGIBLE)) / _FINEST_OCTAVES).astype(np.int32)
    above: NDArray[np.int32] = np.minimum(levels - levels.min(), LARGEST_LEVEL)
    return above


def _counts(codes: NDArray[np.int8], levels: Levels) -> NDArray[np.int64]:
    """Counts codes by levels, [row levels, column levels, values]; row level by row level, to save memory."""
    num_columns = int(levels.columns.max()) + 1
    counts = np.zeros((int(levels.rows.max()) + 1, num_columns, _VALUES), np.int64)
    cells = levels.columns * _VALUES + 128
    for level in range(len(counts)):
        of_level = codes[levels.rows == level]
        if len(of_level):
            found = np.bincount((of_level + cells).ravel(), minlength=num_columns * _VALUES)
            counts[level] = found.reshape(num_columns, _VALUES)
    return counts


def _merged_counts(counts: NDArray[np.int64], factor: int) -> NDArray[np.int64]:
    rows = np.add.reduceat(counts, np.arange(0, counts.shape[0], factor), axis=0)
    return np.add.reduceat(rows, np.arange(0, counts.shape[1], factor), axis=1)


def _by_model(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums counts over the anti-diagonals of levels, which share a model."""
    row_levels, column_levels, _ = counts.shape
    models = np.zeros((row_levels + column_levels - 1, _VALUES), np.int64)
    for level in range(row_levels):
        models[level : level + column_levels] += counts[level]
    return models


def _coded_bytes(counts: NDArray[np.int64], levels: Levels, share: float) -> int:
    models = _by_model(counts)
    symbols = sum(int(np.ptp(np.flatnonzero(model))) + 1 for model in models if model.any())
    by_row = sum(map(entropy_bytes, models)) + entropy_bytes(np.bincount(levels.rows))
    return round(share * by_row + _BYTES_PER_SYMBOL * symbols) + entropy_bytes(np.bincount(levels.columns))
