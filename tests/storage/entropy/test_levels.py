"""Which weights share a model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_lossless.storage.entropy.frequencies import entropy_bytes
from hf_lossless.storage.entropy.levels import Blocks, Levels, best_levels, model_counts

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
CODES = SHAPES.flatmap(lambda shape: arrays(np.int8, shape, elements=st.integers(-127, 127)))


def laplacian(row_spreads, column_spreads, seed: int = 0):
    """Codes of Laplacian numbers whose spread is a product."""
    numbers = np.random.default_rng(seed).laplace(0, 1, (len(row_spreads), len(column_spreads)))
    return np.clip(np.rint(numbers * np.outer(row_spreads, column_spreads)), -127, 127).astype(np.int8)


@given(CODES)
def test_every_entry_has_the_model_of_its_two_levels(codes):
    levels, num_bytes = best_levels(codes)
    assert levels.rows.min() >= 0 and levels.columns.min() >= 0 and num_bytes >= 0
    blocks = Blocks.of(levels)
    numbers = np.full(codes.shape, -1)
    for model in range(levels.num_models):
        for rows, columns in blocks.of_model(model):
            assert (numbers[rows, columns] == -1).all()
            numbers[rows, columns] = model
    expected = levels.rows[blocks.row_order][:, None] + levels.columns[blocks.column_order]
    assert np.array_equal(numbers, expected)

    counts = np.zeros((levels.num_models, 256), np.int64)
    for (row, column), code in np.ndenumerate(codes):
        counts[levels.rows[row] + levels.columns[column], int(code) + 128] += 1
    assert np.array_equal(model_counts(codes, levels), counts)


def test_rows_of_one_level_stay_in_their_order():
    levels = Levels(np.array([1, 0, 1, 0], np.int32), np.array([0], np.int32))
    assert Blocks.of(levels).row_order.tolist() == [1, 3, 0, 2]


@given(CODES, st.integers(1, 64))
def test_merged_levels(codes, factor):
    levels, _ = best_levels(codes)
    merged = levels.merged(factor)
    assert np.array_equal(merged.rows, levels.rows // factor) and np.array_equal(
        merged.columns, levels.columns // factor
    )
    assert merged.num_models <= levels.num_models


def test_like_spreads_get_one_model_and_unlike_ones_several():
    like, _ = best_levels(laplacian(np.full(64, 2.0), np.ones(64)))
    assert like.num_models == 1
    codes = laplacian(2.0 ** np.linspace(-4, 4, 256), np.ones(256))
    unlike, num_bytes = best_levels(codes)
    assert unlike.num_models > 4
    assert num_bytes < 0.85 * entropy_bytes(np.bincount(codes.ravel() + np.int64(128)))


@pytest.mark.parametrize("spreads", [(0.3, 0.3), (0.1, 8.0), (4.0, 30.0)], ids=str)
def test_the_models_are_as_good_as_those_of_the_true_spreads(spreads):
    """A code for each pair of true spreads is what nobody without the weights could do better than."""
    generator = np.random.default_rng(1)
    of_rows, of_columns = generator.choice(spreads, 200), generator.choice(spreads, 300)
    codes = laplacian(of_rows, of_columns)
    _, num_bytes = best_levels(codes)
    ideal = 0
    for row in set(of_rows):
        for column in set(of_columns):
            part = codes[of_rows == row][:, of_columns == column]
            ideal += entropy_bytes(np.bincount(part.ravel() + np.int64(128)))
    levels = (200 + 300) * 3 / 8  # at most three bits for each row and column, whose levels have to be said
    models = 1.5 * 200 * 4
    assert num_bytes <= 1.02 * ideal + levels + models


def test_sampled_rows_stand_for_all():
    codes = laplacian(np.ones(512), 2.0 ** np.linspace(-2, 3, 128))
    _, whole = best_levels(codes)
    _, estimate = best_levels(codes[::4], share=4.0)
    assert estimate == pytest.approx(whole, rel=0.03)
