"""A low-rank layer computes what the dense layer with W = L R (+ grid) computes, without ever building W."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rounded_plans import apply_rounded
from tiny_plans import by_hand, dense_matrix, dense_twin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_lossless.storage.apply import apply_plan
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.modules.base import CompressedModule, compressed_layers
from hf_lossless.storage.modules.low_rank import LowRankModule
from hf_lossless.storage.modules.packed import PackedModule

LAYERS = {
    "linear": lambda: nn.Linear(20, 14),
    "linear-no-bias": lambda: nn.Linear(14, 20, bias=False),
    "conv1d": lambda: Conv1D(14, 20),
    "conv2d": lambda: nn.Conv2d(4, 14, 3, padding=1),
    "conv2d-strided": lambda: nn.Conv2d(4, 14, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False),
    "conv2d-same": lambda: nn.Conv2d(4, 14, 3, padding="same", dilation=2),
    "embedding": lambda: nn.Embedding(30, 16),
    "embedding-padded": lambda: nn.Embedding(30, 16, padding_idx=3),
}
STORED = {
    "float": {"kind": "low_rank"},
    "packed": {"kind": "low_rank", "left": 4, "right": 5},
    "left-packed": {"kind": "low_rank", "left": 4},
    "right-packed": {"kind": "low_rank", "right": 4},
    "sum": {"kind": "sum"},
    "sum-packed": {"kind": "sum", "left": 4, "right": 8},
}
EACH_LAYER = pytest.mark.parametrize("name", LAYERS)
ONE_OF_EACH_KIND = pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "embedding-padded"])
EACH_STORED = pytest.mark.parametrize("stored", STORED)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def layer_of(name: str, dtype: torch.dtype = torch.float32) -> Layer:
    torch.manual_seed(0)
    module = LAYERS[name]().to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return find_layers(nn.ModuleDict({"layer": module}))[0]


def input_of(layer: Layer, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if layer.kind == "embedding":
        return torch.randint(0, 30, (2, 3, 2), generator=generator)
    shape = (2, 4, 9, 8) if layer.kind == "conv2d" else (2, 5, layer.matrix.shape[1])
    return torch.randn(shape, generator=generator).to(dtype)


def low_rank(layer: Layer, **settings) -> LowRankModule:
    plan, factors = by_hand(layer, **settings)
    model = nn.ModuleDict({"layer": copy.deepcopy(layer.module)})
    apply_rounded(model, {"layer": plan}, {"layer": factors})
    module = model["layer"]
    assert isinstance(module, LowRankModule) and module.weight_bytes == plan.cost_bytes
    return module


def dense(layer: Layer, **settings) -> nn.Module:
    plan, factors = by_hand(layer, **settings)
    return dense_twin(layer, dense_matrix(layer, plan, factors))


class Shapes(TorchDispatchMode):
    """Notes the size of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.sizes.add(tuple(tensor.shape))
        return result


@contextmanager
def no_matrix(monkeypatch: pytest.MonkeyPatch, matrix_shape: tuple[int, int]) -> Iterator[None]:
    """Within, a weight as large as the layer's may not be built."""

    def refused(self: CompressedModule) -> Tensor:
        raise AssertionError("the whole weight was built")

    with monkeypatch.context() as patch, Shapes() as shapes:
        patch.setattr(LowRankModule, "matrix", refused)
        yield
    numel = matrix_shape[0] * matrix_shape[1]
    assert not {matrix_shape, matrix_shape[::-1], (numel,), (1, numel)} & shapes.sizes


@EACH_STORED
@EACH_LAYER
def test_equals_the_dense_layer(name: str, stored: str):
    layer = layer_of(name)
    module, twin = low_rank(layer, **STORED[stored]), dense(layer, **STORED[stored])
    torch.testing.assert_close(module.matrix(), dense_layer_matrix(twin, layer), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.weight, twin.weight.detach(), rtol=1e-5, atol=1e-5)
    assert module.weight.shape == layer.weight.shape and module.weight._is_hf_initialized
    x = input_of(layer)
    expected = twin(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-4)
    assert module(x).shape == expected.shape


def dense_layer_matrix(module: nn.Module, layer: Layer) -> Tensor:
    return Layer("layer", module, layer.kind).matrix.detach()


@EACH_STORED
@EACH_LAYER
def test_no_forward_pass_builds_the_weight(monkeypatch: pytest.MonkeyPatch, name: str, stored: str):
    layer = layer_of(name)
    module, x = low_rank(layer, **STORED[stored]), input_of(layer)
    expected = module(x)
    base_too = stored.startswith("sum") and layer.kind != "embedding"  # a packed base unpacks its own
    with no_matrix(monkeypatch, (0, 0) if base_too else module.matrix_shape):
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("indices", [[4], [[1, 1], [29, 0]], 7], ids=["row", "matrix", "scalar"])
@pytest.mark.parametrize("stored", ["float", "packed", "sum-packed"])
def test_an_embedding_takes_indices_of_any_shape(stored: str, indices):
    layer = layer_of("embedding-padded")
    module, twin = low_rank(layer, **STORED[stored]), dense(layer, **STORED[stored])
    indices = torch.tensor(indices, dtype=torch.long)
    torch.testing.assert_close(module(indices), twin(indices), rtol=1e-5, atol=1e-5)
    for wrong in (-1, 30):
        with pytest.raises(IndexError):
            module(torch.tensor([0, wrong]))


@EACH_STORED
@ONE_OF_EACH_KIND
def test_linear_and_embedding_of_any_kind(monkeypatch: pytest.MonkeyPatch, name: str, stored: str):
    """What tied modules call."""
    layer = layer_of(name)
    module = low_rank(layer, **STORED[stored])
    out_features, in_features = module.matrix_shape
    x, bias, indices = torch.randn(3, in_features), torch.randn(out_features), torch.tensor([[0, 5], [5, 2]])
    matrix = module.matrix()
    with no_matrix(monkeypatch, (0, 0) if module.base is not None else module.matrix_shape):
        outputs = module.linear(x, bias), module.linear(x, None), module.embedding(indices)
    torch.testing.assert_close(outputs[0], x @ matrix.T + bias, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(outputs[1], x @ matrix.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(outputs[2], matrix[indices], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@EACH_STORED
@ONE_OF_EACH_KIND
def test_a_cast_takes_the_factors_along_and_leaves_codes_alone(name: str, stored: str, dtype: torch.dtype):
    layer = layer_of(name)
    module = low_rank(layer, **STORED[stored])
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    module.to(dtype)
    assert module.dtype == module.weight.dtype == dtype
    for key, tensor in module.state_dict().items():
        if key.endswith((".weight", "bias")):
            assert tensor.dtype == dtype
        else:
            assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key])
    twin, x = dense(layer, **STORED[stored]).to(dtype), input_of(layer, dtype)
    output = module(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output, twin(x), rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH_STORED
@ONE_OF_EACH_KIND
def test_factors_are_stored_in_the_dtype_of_the_weight(name: str, stored: str, dtype: torch.dtype):
    layer = layer_of(name, dtype)
    module = low_rank(layer, **STORED[stored])
    floats = [tensor for key, tensor in module.state_dict().items() if key.endswith(".weight")]
    assert all(tensor.dtype == dtype for tensor in floats)
    x = input_of(layer, dtype)
    output, expected = module(x), dense(layer, **STORED[stored])(x)
    assert output.dtype == expected.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])


@EACH_STORED
@EACH_LAYER
def test_state_dict_round_trip(name: str, stored: str):
    layer = layer_of(name)
    module, x = low_rank(layer, **STORED[stored]), input_of(layer)
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    twin = copy.deepcopy(module)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert torch.equal(module(x), low_rank(layer, **STORED[stored])(x))  # the copy shares nothing
    assert not twin(x).any()
    assert not any(twin.load_state_dict(state))
    assert torch.equal(twin(x), module(x))

    plan, _ = by_hand(layer, **STORED[stored])
    with torch.device("meta"):
        empty = nn.ModuleDict({"layer": LAYERS[name]()})
    apply_plan(empty, {"layer": plan})
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict({f"layer.{key}": tensor for key, tensor in state.items()}, assign=True)
    assert torch.equal(empty["layer"](x), module(x))


def test_names_in_the_state_dict():
    names = {
        "float": ["bias", "left.weight", "right.weight"],
        "left-packed": ["bias", "left.codes", "left.scales", "right.weight"],
        "sum-packed": [
            *("base.codes", "base.scales", "bias", "left.codes", "left.scales"),
            *("right.codes", "right.scales", "right.zeros"),
        ],
    }
    for stored, expected in names.items():
        module = low_rank(layer_of("linear"), **STORED[stored])
        assert sorted(module.state_dict()) == [*expected, "weight"]  # the guard
        assert list(module.weight_tensors) == [name for name in module.state_dict() if name not in ("bias", "weight")]


@EACH_LAYER
def test_shapes_of_the_factors(name: str):
    layer = layer_of(name)
    out_features, in_features = layer.matrix.shape
    module = low_rank(layer, **STORED["float"])
    one = (1, 1) if layer.kind == "conv2d" else ()
    assert module.left.weight.shape == (out_features, 2, *one)
    assert module.right.weight.flatten(1).shape == (2, in_features)
    if layer.kind == "conv2d":
        assert module.right.weight.shape == (2, *layer.weight.shape[1:])
    packed = low_rank(layer, **STORED["packed"])
    assert isinstance(packed.left, PackedModule) and isinstance(packed.right, PackedModule)
    assert len(packed.left.codes) == (out_features if layer.kind == "embedding" else 1)


@EACH_LAYER
def test_attributes_of_the_original(name: str):
    original = layer_of(name).module
    module = low_rank(layer_of(name), **STORED["sum"])
    for attribute in (
        *("in_features", "out_features", "nx", "nf", "num_embeddings", "embedding_dim", "padding_idx"),
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "padding_mode", "dilation", "groups"),
    ):
        assert getattr(module, attribute, None) == getattr(original, attribute, None)
    assert "rank=2" in repr(module)


@pytest.mark.parametrize("trainable", [True, False])
@EACH_STORED
@ONE_OF_EACH_KIND
def test_factors_are_trainable_where_the_weight_was(name: str, stored: str, trainable: bool):
    layer = layer_of(name)
    layer.weight.requires_grad_(trainable)
    module = low_rank(layer, **STORED[stored])
    weights = [parameter for key, parameter in module.named_parameters() if key != "bias"]
    assert len(weights) == {"float": 2, "sum": 2, "left-packed": 1, "right-packed": 1}.get(stored, 0)
    assert all(parameter.requires_grad == trainable for parameter in weights)
    if weights and trainable:
        module(input_of(layer)).sum().backward()
        assert all(parameter.grad is not None for parameter in weights)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_original(training: bool):
    layer = layer_of("linear")
    layer.module.train(training)
    for stored in STORED.values():
        assert {part.training for part in low_rank(layer, **stored).modules()} == {training}


@EACH_STORED
@ONE_OF_EACH_KIND
def test_nothing_is_drawn_from_the_random_generator(name: str, stored: str):
    layer = layer_of(name)
    plan, factors = by_hand(layer, **STORED[stored])
    before = torch.get_rng_state()
    apply_rounded(nn.ModuleDict({"layer": layer.module}), {"layer": plan}, {"layer": factors})
    assert torch.equal(torch.get_rng_state(), before)


@EACH_STORED
@EACH_LAYER
def test_autocast_gives_the_dtype_that_the_original_gives(name: str, stored: str):
    layer = layer_of(name)
    module, x = low_rank(layer, **STORED[stored]), input_of(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == layer.module(x).dtype


def test_the_parts_of_a_layer_are_not_layers():
    model = nn.Sequential(nn.Linear(20, 14), nn.ReLU(), nn.Linear(14, 14))
    layers = find_layers(model)
    made = {layer.name: by_hand(layer, **STORED["sum-packed"]) for layer in layers}
    plans = {name: plan for name, (plan, _) in made.items()}
    apply_rounded(model, plans, {name: factors for name, (_, factors) in made.items()})
    assert list(compressed_layers(model)) == ["0", "2"]
    assert sum(isinstance(module, CompressedModule) for module in model.modules()) == 8
