"""What decoding gives back, where blocks are few and codes far."""

import numpy as np
import torch
from torch import nn

from hf_lossless.coding.matrix import CodedMatrix, decode, encode
from hf_lossless.coding.spread import Blocks, best_spread
from hf_lossless.layers import find_layers
from hf_lossless.modules.coded import CodedLinear


def test_models_that_no_block_uses():
    """Rows of two far-apart spreads over columns of one: no block has the models between."""
    generator = np.random.default_rng(0)
    codes = np.concatenate([generator.integers(-1, 2, (64, 512)), generator.integers(-100, 101, (64, 512))])
    matrix = CodedMatrix.of(codes.astype(np.int32), np.ones(128, np.float32), np.ones(512, np.float32))
    spread, _ = best_spread(matrix.codes)
    blocks = Blocks.of(spread)
    assert not all(list(blocks.of_model(model)) for model in range(spread.num_models))
    np.testing.assert_array_equal(decode(encode(matrix), (128, 512)).codes, matrix.codes)


def test_a_decoded_layer_with_far_codes_runs():
    """Codes lie row by row, or else far ones could not be put into their places."""
    generator = np.random.default_rng(1)
    codes = (generator.laplace(size=(96, 64)) * np.geomspace(1, 40, 64)).round().astype(np.int32)
    codes[5, 7] = 1000
    steps = np.full(96, 0.25, np.float32), np.full(64, 0.5, np.float32)
    stored = encode(CodedMatrix.of(codes, *steps))
    assert decode(stored, (96, 64)).codes.flags.c_contiguous
    (layer,) = find_layers(nn.Sequential(nn.Linear(64, 96)))
    module = CodedLinear(layer, len(stored))
    module.coded.copy_(torch.from_numpy(stored))
    module.decode("layer")
    torch.testing.assert_close(module.matrix(), torch.from_numpy(codes * np.float32(0.125)))
    assert module(torch.ones(2, 64)).shape == (2, 96)
