"""Convolutions in each run time compute what the floating-point path does."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from hf_lossless.candidates.uniform import quantise
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.modules.packed import PACKED, PackedModule
from hf_lossless.storage.plan import Grid
from hf_lossless.storage.runtime.convolution import DenseConv2d, Int8Conv2d
from hf_lossless.storage.runtime.int8_linear import int8_available
from hf_lossless.storage.runtime.optimize import optimize

pytestmark = pytest.mark.skipif(not int8_available(), reason="this torch has no kernels in whole numbers")

CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(33, 121, 3), Int8Conv2d),
    "strided": (lambda: nn.Conv2d(33, 121, (3, 5), stride=(2, 1), padding=(1, 2), bias=False), Int8Conv2d),
    "dilated": (lambda: nn.Conv2d(33, 121, 3, dilation=2, padding=1), Int8Conv2d),
    "named-padding": (lambda: nn.Conv2d(33, 121, 3, padding="same"), DenseConv2d),
    "grouped": (lambda: nn.Conv2d(33, 121 * 3, 3, groups=3), DenseConv2d),
    "depthwise": (lambda: nn.Conv2d(33, 33, 3, groups=33), DenseConv2d),
    "small": (lambda: nn.Conv2d(33, 4, 1), DenseConv2d),
}
EACH = pytest.mark.parametrize("name", CONVOLUTIONS)


def layer_of(name: str) -> PackedModule:
    torch.manual_seed(0)
    layer = find_layers(nn.ModuleDict({"layer": CONVOLUTIONS[name][0]()}))[0]
    quantised = quantise(layer.matrix.detach(), Grid(bits=4, group_size=32))
    module = PACKED["conv2d"](layer, quantised.grid)
    module.store(quantised)
    return module


def images(count: int) -> Tensor:
    """Some a thousand times as bright as others."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 33, 13, 11, generator=generator) * 10 ** torch.randn(count, 1, 1, 1, generator=generator)


@EACH
@pytest.mark.parametrize("rectified", [False, True], ids=["any", "rectified"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_image_is_as_precise_as_the_others(name: str, rectified: bool, count: int):
    layer, input = layer_of(name), images(count)
    input = input.relu() if rectified else input
    with torch.no_grad():
        expected = layer(input)
        optimize(layer, "auto")
        assert isinstance(layer.form, DenseConv2d)
        torch.testing.assert_close(layer(input), expected)
        optimize(layer, "fast")
        assert isinstance(layer.form, CONVOLUTIONS[name][1])
        found = layer(input)
        assert found.shape == expected.shape
        if count:
            errors = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
            assert errors.max() < 0.03


@EACH
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_comes_out(name: str, value: float):
    layer, input = layer_of(name), images(3)
    input[1, 4, 5, 6] = value
    with torch.no_grad():
        expected = layer(input)
        optimize(layer, "fast")
        assert torch.equal(layer(input).isfinite(), expected.isfinite())


@pytest.mark.parametrize("name", ["plain", "strided"])
def test_copies_pickles_and_strides(name: str):
    layer = layer_of(name)
    optimize(layer, "fast")
    with torch.no_grad():
        expected = layer(images(2))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(images(2)), expected)
        assert torch.equal(layer(images(2).to(memory_format=torch.channels_last)), expected)
        assert torch.equal(layer(images(2).repeat_interleave(2, 0)[::2]), expected)
