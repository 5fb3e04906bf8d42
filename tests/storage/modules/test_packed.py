"""A packed layer computes what the dense layer with the unpacked weight computes."""

import copy

import pytest
import torch
from tiny_plans import dense_twin, fitting_grid
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lossless.candidates.uniform import on_grid, quantise
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.modules.packed import PACKED, PackedModule

LAYERS = {
    "linear": lambda: nn.Linear(20, 14),
    "conv1d": lambda: Conv1D(14, 20),
    "conv2d": lambda: nn.Conv2d(4, 14, 3, stride=2, padding=1),
    "conv2d-grouped": lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2, bias=False),
    "conv2d-depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same"),
    "embedding": lambda: nn.Embedding(30, 20, padding_idx=3),
}
GRIDS = {
    "row": {"bits": 3},
    "groups": {"bits": 4, "group_size": 8},
    "asymmetric": {"bits": 2, "group_size": 8, "symmetric": False},
}
EACH_LAYER = pytest.mark.parametrize("name", LAYERS)
EACH_GRID = pytest.mark.parametrize("grid", GRIDS)


def layer_of(name: str) -> Layer:
    torch.manual_seed(0)
    return find_layers(nn.ModuleDict({"layer": LAYERS[name]()}))[0]


def packed(layer: Layer, grid: str) -> PackedModule:
    quantised = quantise(layer.matrix, fitting_grid(layer.matrix, **GRIDS[grid]))
    module = PACKED[layer.kind](layer, quantised.grid)
    module.store(quantised)
    return module


@EACH_GRID
@EACH_LAYER
def test_equals_the_dense_layer(name: str, grid: str):
    layer = layer_of(name)
    module, matrix = packed(layer, grid), on_grid(layer.matrix, fitting_grid(layer.matrix, **GRIDS[grid]))
    assert torch.equal(module.matrix(), matrix)
    twin = dense_twin(layer, matrix)
    assert torch.equal(module.weight, twin.weight)
    shape = (2, 4, 9, 8) if layer.kind == "conv2d" else (2, 5, 20)
    x = torch.randint(0, 30, (2, 3)) if layer.kind == "embedding" else torch.randn(shape)
    assert torch.equal(module(x), twin(x))


@EACH_GRID
@EACH_LAYER
def test_linear_and_embedding_of_any_kind(name: str, grid: str):
    """What tied modules call."""
    module = packed(layer_of(name), grid)
    matrix = module.matrix()
    out_features, in_features = matrix.shape
    x, bias, indices = torch.randn(3, in_features), torch.randn(out_features), torch.tensor([[0, 3], [3, 2]])
    assert torch.equal(module.linear(x, bias), nn.functional.linear(x, matrix, bias))
    assert torch.equal(module.linear(x, None), nn.functional.linear(x, matrix))
    assert torch.equal(module.embedding(indices), matrix[indices])


@EACH_GRID
@EACH_LAYER
def test_bytes_and_names_of_what_stands_for_the_weight(name: str, grid: str):
    module = packed(layer_of(name), grid)
    names = ["codes", "scales", "zeros"] if grid == "asymmetric" else ["codes", "scales"]
    assert list(module.weight_tensors) == names
    assert module.weight_bytes == sum(module.state_dict()[name].nbytes for name in names)


@EACH_LAYER
def test_attributes_of_the_original(name: str):
    layer = layer_of(name)
    module = packed(layer, "row")
    for attribute in (
        *("in_features", "out_features", "nx", "nf", "num_embeddings", "embedding_dim", "padding_idx"),
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "padding_mode", "dilation", "groups"),
    ):
        assert getattr(module, attribute, None) == getattr(layer.module, attribute, None)
    assert module.bias is getattr(layer.module, "bias", None)


@EACH_GRID
@EACH_LAYER
def test_a_cast_leaves_codes_and_scales_alone(name: str, grid: str):
    module = packed(layer_of(name), grid)
    twin = copy.deepcopy(module).to(torch.bfloat16)
    assert twin.dtype == twin.weight.dtype == torch.bfloat16
    for part, tensor in module.weight_tensors.items():
        assert torch.equal(twin.weight_tensors[part], tensor)
        assert twin.weight_tensors[part].dtype == tensor.dtype
    assert torch.equal(twin.to(torch.float32).matrix(), module.matrix())
