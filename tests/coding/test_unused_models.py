"""A matrix whose levels leave some models without a block."""

import numpy as np

from hf_lossless.coding.matrix import CodedMatrix, decode, encode
from hf_lossless.coding.spread import Blocks, best_spread


def test_models_that_no_block_uses():
    """Rows of two far-apart spreads over columns of one: no block has the models between."""
    generator = np.random.default_rng(0)
    codes = np.concatenate([generator.integers(-1, 2, (64, 512)), generator.integers(-100, 101, (64, 512))])
    matrix = CodedMatrix.of(codes.astype(np.int32), np.ones(128, np.float32), np.ones(512, np.float32))
    spread, _ = best_spread(matrix.codes)
    blocks = Blocks.of(spread)
    assert not all(list(blocks.of_model(model)) for model in range(spread.num_models))
    np.testing.assert_array_equal(decode(encode(matrix), (128, 512)).codes, matrix.codes)
