"""What is proposed for each kind of layer, and what it costs."""

import pytest
import torch
from rounded_plans import apply_rounded
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lossless.calibration.statistics import LayerStatistics, Moments
from hf_lossless.candidates.grids import Candidate, propose_grids
from hf_lossless.candidates.uniform import quantise
from hf_lossless.errors import CalibrationError
from hf_lossless.storage.grid import dequantise
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.plan import Grid, LayerPlan

MODULES = {
    "linear": lambda: nn.Linear(20, 6),
    "conv1d": lambda: Conv1D(6, 20),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "embedding": lambda: nn.Embedding(9, 20),
}
KINDS = pytest.mark.parametrize("kind", MODULES)
NO_GRADIENT = Moments(0.0, 1.0, 10)


def layer_of(kind: str, seed: int = 0) -> Layer:
    torch.manual_seed(seed)
    return find_layers(nn.ModuleDict({"layer": MODULES[kind]()}))[0]


def statistics(gradient: Moments = NO_GRADIENT, calls: int = 1) -> LayerStatistics:
    return LayerStatistics(calls=calls, inputs=None, weight_gradient=gradient)


@KINDS
@pytest.mark.parametrize("group_size", [None, 8], ids=["row", "g8"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_candidates(kind, group_size, symmetric):
    layer = layer_of(kind)
    candidates = propose_grids(layer, statistics(), (8, 1, 4, 16, 3), group_size, symmetric)
    assert [None if c.grid is None else c.grid.bits for c in candidates] == [1, 3, 4, 8, None]
    assert candidates[-1] == Candidate(None, layer.weight.nbytes)
    for candidate in candidates[:-1]:
        assert candidate.grid.group_size == group_size and candidate.grid.symmetric == symmetric
        assert candidate.grid.rounding == "nearest"
        quantised = quantise(layer.matrix, candidate.grid)
        error = dequantise(quantised.codes, quantised.scales, quantised.zeros, quantised.grid) - layer.matrix
        assert candidate.noise == pytest.approx((error.norm() / error.numel() ** 0.5).item())
        assert torch.equal(candidate.scales, quantised.scales)
        assert candidate.step == pytest.approx(quantised.scales.double().square().mean().sqrt().item())
    noises = [candidate.noise for candidate in candidates]
    assert noises == sorted(noises, reverse=True)
    costs = [candidate.cost_bytes for candidate in candidates]
    assert costs == sorted(costs)


@KINDS
@pytest.mark.parametrize("bits", [2, 3, 8], ids=lambda bits: f"{bits}bit")
@pytest.mark.parametrize("group_size", [None, 7], ids=["row", "g7"])
def test_cost_is_that_of_the_module(kind, bits, group_size):
    layer = layer_of(kind)
    (candidate,) = propose_grids(layer, statistics(), (bits,), group_size, False)
    model = nn.ModuleDict({"layer": layer.module})
    plan = LayerPlan(kind="grid", grid=candidate.grid, cost_bytes=candidate.cost_bytes, predicted_loss_change=0.0)
    apply_rounded(model, {"layer": plan})
    stored = {name: tensor.nbytes for name, tensor in model.state_dict().items() if not name.endswith("bias")}
    assert sum(stored.values()) == candidate.cost_bytes


def test_half_precision_keeps_at_its_own_size():
    layer = find_layers(nn.ModuleDict({"layer": nn.Linear(20, 6).to(torch.bfloat16)}))[0]
    grid, keep = propose_grids(layer, statistics(), (4, 16), None, True)
    assert keep.cost_bytes == 20 * 6 * 2
    assert grid.cost_bytes == 20 * 6 // 2 + 6 * 2 and 0 < grid.noise < grid.step


def test_a_group_as_long_as_the_row_is_the_row():
    layer = layer_of("linear")
    for group_size in (20, 21, 64):
        (candidate,) = propose_grids(layer, statistics(), (4,), group_size, True)
        assert candidate.grid == Grid(bits=4)


@pytest.mark.parametrize(("mean", "rounding"), [(1.0, "down"), (-1.0, "up"), (0.5, "nearest")])
def test_rounding_opposes_a_gradient_that_is_sure(mean, rounding):
    (candidate,) = propose_grids(layer_of("linear"), statistics(Moments(mean, 0.4, 120)), (3,), None, True)
    assert candidate.grid.rounding == rounding


def test_an_unreached_layer_can_only_be_kept():
    layer = layer_of("embedding")
    for bits in ((2, 16), (2, 4)):
        assert propose_grids(layer, statistics(calls=0), bits, 8, True) == [Candidate(None, layer.weight.nbytes)]


def test_scales_are_in_float32_where_needed():
    layer = layer_of("linear")
    (half,) = propose_grids(layer, statistics(), (4,), None, True)
    layer.weight.data *= 1e-6
    (single,) = propose_grids(layer, statistics(), (4,), None, True)
    assert half.grid.scale_dtype == "float16" and single.grid.scale_dtype == "float32"
    assert single.cost_bytes - half.cost_bytes == 6 * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_weight_that_is_not_finite(value):
    layer = layer_of("linear")
    layer.weight.data[2, 3] = value
    message = "weight of layer 'layer' holds NaN or infinity.*finite weights, or keep this layer out with modules_to"
    with pytest.raises(CalibrationError, match=message):
        propose_grids(layer, statistics(), (4, 16), None, True)
