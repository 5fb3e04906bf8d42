"""Modules with quantised inputs compute what the dense layer computes with such an input."""

import copy

import pytest
import torch
from rounded_plans import apply_rounded
from tiny_plans import by_hand, dense_matrix, dense_twin
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lossless.storage.activation_grid import (
    DYNAMIC_AXES,
    StaticGrid,
    dynamic_range,
    on_activation_grid,
    scale_and_zero,
)
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.plan import ActivationGrid

STORED = {
    "grid": {"kind": "grid"},
    "float": {"kind": "low_rank"},
    "packed": {"kind": "low_rank", "left": 4, "right": 5},
    "sum": {"kind": "sum", "left": 4},
}
LAYERS = {
    "linear": (lambda: nn.Linear(12, 16), (3, 5, 12)),
    "conv1d": (lambda: Conv1D(16, 12), (3, 5, 12)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 6)),
}
STATIC = StaticGrid(torch.tensor([0.17]), torch.tensor([3], dtype=torch.uint8))


def quantised(build, stored: dict, grid: ActivationGrid):
    """A model of one layer with a quantised input, and the same layer dense, with the weight that is stored."""
    torch.manual_seed(0)
    model = nn.Sequential(build())
    (layer,) = find_layers(model)
    plan, factors = by_hand(layer, **stored)
    twin = dense_twin(layer, dense_matrix(layer, plan, factors))
    plan = plan.model_copy(update={"activation": grid, "cost_bytes": plan.cost_bytes + grid.stored_bytes})
    static = {"0": STATIC} if grid.range == "static" else {}
    apply_rounded(model, {"0": plan}, {} if factors is None else {"0": factors}, static_grids=static)
    assert model[0].weight_bytes == plan.cost_bytes
    return model, twin, layer.kind


def expected_input(values, kind, grid):
    scale, zero = STATIC.scale, STATIC.zero
    if grid.range == "dynamic":
        scale, zero = scale_and_zero(*dynamic_range(values, DYNAMIC_AXES[kind]), grid.bits)
    return on_activation_grid(values, scale, zero, grid.bits)


@pytest.mark.parametrize("range", ["static", "dynamic"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", LAYERS)
def test_the_dense_layer_on_the_quantised_input(name, stored, bits, range):
    build, shape = LAYERS[name]
    grid = ActivationGrid(bits=bits, range=range)
    model, twin, kind = quantised(build, STORED[stored], grid)
    values = torch.randn(shape)
    torch.testing.assert_close(model(values), twin(expected_input(values, kind, grid)), rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) & {"0.activation.scale", "0.activation.zero"} == (
        {"0.activation.scale", "0.activation.zero"} if range == "static" else set()
    )
    with torch.no_grad():
        before = model(values)
    assert torch.equal(before, model(values.requires_grad_()))  # the way of the gradient changes nothing
    assert torch.equal(copy.deepcopy(model)(values), before)


@pytest.mark.parametrize("range", ["static", "dynamic"])
def test_the_gradient_passes_the_rounding(range):
    build, shape = LAYERS["linear"]
    model, twin, kind = quantised(build, STORED["grid"], ActivationGrid(bits=4, range=range))
    values = torch.randn(shape, requires_grad=True)
    model(values).square().sum().backward()
    inner = expected_input(values.detach(), kind, model[0].activation.grid).requires_grad_()
    twin(inner).square().sum().backward()
    torch.testing.assert_close(values.grad, inner.grad, rtol=1e-4, atol=1e-4)


def test_a_cast_leaves_the_scale_alone():
    model, _, _ = quantised(LAYERS["linear"][0], STORED["packed"], ActivationGrid(bits=8, range="static"))
    for cast in (model.to(torch.bfloat16), model.half(), model.double(), model.to("cpu", torch.bfloat16)):
        activation = cast[0].activation
        assert torch.equal(activation.scale, STATIC.scale) and activation.scale.dtype == torch.float32
        assert torch.equal(activation.zero, STATIC.zero) and activation.zero.dtype == torch.uint8
    assert model(torch.randn(2, 12).bfloat16()).dtype == torch.bfloat16
    assert model.to("meta")[0].activation.scale.is_meta


@pytest.mark.parametrize("shape", [(0, 12), (4, 0, 12)], ids=str)
@pytest.mark.parametrize("range", ["static", "dynamic"])
def test_no_positions(range, shape):
    model, _, _ = quantised(LAYERS["linear"][0], STORED["grid"], ActivationGrid(bits=8, range=range))
    assert model(torch.empty(shape)).shape == (*shape[:-1], 16)


def test_zeros_and_an_image_without_a_batch():
    model, twin, kind = quantised(LAYERS["conv2d"][0], STORED["grid"], ActivationGrid(bits=8, range="dynamic"))
    image = torch.randn(3, 6, 6)
    wanted = twin(expected_input(image, kind, model[0].activation.grid))
    torch.testing.assert_close(model(image), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(torch.zeros(1, 3, 6, 6)), twin(torch.zeros(1, 3, 6, 6)))


def test_an_image_does_not_depend_on_its_batch():
    model, _, _ = quantised(LAYERS["conv2d"][0], STORED["grid"], ActivationGrid(bits=4, range="dynamic"))
    images = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_what_is_printed():
    model, _, _ = quantised(LAYERS["linear"][0], STORED["grid"], ActivationGrid(bits=4, range="dynamic"))
    assert "(activation): QuantisedInput(bits=4, range=dynamic)" in repr(model)
