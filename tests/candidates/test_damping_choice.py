"""The scale of dampings, against a slow choice on copies of a model."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.calibration.fisher import fisher_batches, with_fisher
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.candidates import damping_choice as module_under_test
from hf_lossless.candidates.damping import SHAPED
from hf_lossless.candidates.damping_choice import LADDER, MOST_LAYERS, RESOLUTION, chosen_scale
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.round_coded import round_coded
from hf_lossless.candidates.shaped import step_at
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.plan import CodedGrid, Damping

FEATURES, CLASSES = 24, 5


def network(depth: int = 2, gain: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [one for _ in range(depth) for one in (nn.Linear(FEATURES, FEATURES), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(FEATURES, CLASSES)).eval()
    with torch.no_grad():
        model[-1].weight *= gain
    return model


def batches_of(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, FEATURES, generator=generator), torch.arange(rows) % CLASSES) for rows in sizes]


def calibrated(model: nn.Module, batches: list) -> tuple[list[Layer], Calibration]:
    layers = find_layers(model)
    calibration = calibrate(model, batches, layers, batch_loss)
    return layers, with_fisher(calibration, model, fisher_batches(model, batches, 0), layers)


def criterion(model: nn.Module, batches: list, layers: list[Layer], calibration: Calibration, scale: float) -> float:
    """On a copy with the rounded weights put in, layer by layer, with the metric of the even batches."""
    damping = Damping(rows=scale * SHAPED.rows, columns=scale * SHAPED.columns)
    rounded, bits = copy.deepcopy(model), 0
    for layer in layers:
        even = calibration.layers[layer.name].halves[0]
        step = step_at(RESOLUTION, layer.matrix, InverseRoots.of(even, damping))
        grid = CodedGrid(step=step, damping=damping, shape=tuple(layer.matrix.shape))
        statistics = dataclasses.replace(calibration.layers[layer.name], curvature=even)
        alone = Calibration({layer.name: statistics}, loss=0.0, num_examples=1)
        one = round_coded([layer], {layer.name: grid}, alone)[layer.name]
        rounded.get_submodule(layer.name).weight.data = one.values.dense
        bits += 8 * one.values.stored.nbytes
    inputs = torch.cat([x for x, _ in batches[1::2]])
    before, after = (one(inputs).detach().log_softmax(-1) for one in (model, rounded))
    moved = F.kl_div(after, before, reduction="batchmean", log_target=True).item()
    return math.log(moved) + 2 * math.log(2) * bits / sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize(
    ("sizes", "gain", "depth", "expected"),
    [((400, 100), 1.0, 2, 0.3), ((400, 100), 4.0, 2, 1.0), ((6, 9, 7), 1.0, 2, 3.0), ((3, 40), 30.0, 2, 3.0)],
    ids=str,
)
def test_the_least_criterion(sizes, gain, depth, expected):
    model, batches = network(depth, gain), batches_of(*sizes)
    layers, calibration = calibrated(model, batches)
    costs = {scale: criterion(model, batches, layers, calibration, scale) for scale in LADDER}
    assert min(costs, key=costs.get) == expected  # each number of the ladder is the best of some
    assert chosen_scale(model, batches, layers, calibration) == expected


def test_what_is_compared(caplog):
    """Divergences and bits are those of the slow recomputation."""
    model, batches = network(), batches_of(6, 9)
    layers, calibration = calibrated(model, batches)
    with caplog.at_level("INFO", logger=module_under_test.__name__):
        chosen_scale(model, batches, layers, calibration)
    assert len(caplog.records) == len(LADDER)
    for scale, record in zip(LADDER, caplog.records, strict=True):
        of_scale, moved, bits = record.args
        expected = criterion(model, batches, layers, calibration, scale)
        assert of_scale == scale
        assert math.log(moved) + 2 * math.log(2) * bits == pytest.approx(expected, abs=1e-4)


def test_the_best_stands_anywhere_on_the_ladder(monkeypatch):
    model, batches = network(), batches_of(6, 9)
    layers, calibration = calibrated(model, batches)
    costs = {scale: criterion(model, batches, layers, calibration, scale) for scale in LADDER}
    monkeypatch.setattr(module_under_test, "LADDER", LADDER[::-1])
    assert chosen_scale(model, batches, layers, calibration) == min(costs, key=costs.get)


def test_the_default_with_one_batch_only():
    model, batches = network(gain=4.0), batches_of(15)
    layers, calibration = calibrated(model, batches)
    assert calibration.layers["0"].halves is None
    assert chosen_scale(model, batches, layers, calibration) == 1.0


def test_the_default_where_the_odd_batches_have_no_classes():
    model, batches = network(gain=1.0), batches_of(6, 9, 7)
    layers, calibration = calibrated(model, batches)
    assert chosen_scale(model, batches, layers, calibration) == 3.0
    batches[1] = batches[1][0], torch.zeros(9, CLASSES)
    assert chosen_scale(model, batches, layers, calibration) == 1.0


def test_the_default_where_nothing_can_be_told(monkeypatch):
    model, batches = network(gain=4.0), batches_of(6, 9, 7)
    layers, calibration = calibrated(model, batches)
    monkeypatch.setattr(module_under_test, "divergence", lambda before, after: math.nan)
    assert chosen_scale(model, batches, layers, calibration) == 1.0


def test_the_model_is_left_as_it_was():
    model, batches = network(), batches_of(6, 9)
    layers, calibration = calibrated(model, batches)
    model[0].bias.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    chosen_scale(model, batches, layers, calibration)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_more_layers_than_are_needed_and_all_over_the_model(monkeypatch):
    model, batches = network(depth=19), batches_of(6, 9)
    layers, calibration = calibrated(model, batches)
    tried = []

    def watched(of_layers, grids, fitted):
        tried.append([layer.name for layer in of_layers])
        return round_coded(of_layers, grids, fitted)

    monkeypatch.setattr(module_under_test, "round_coded", watched)
    chosen_scale(model, batches, layers, calibration)
    names = [layer.name for layer in layers]
    assert len(layers) == 20 and tried == [names[::3]] * len(LADDER)
    assert len(tried[0]) <= MOST_LAYERS
