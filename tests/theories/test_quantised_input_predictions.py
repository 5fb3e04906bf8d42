"""The second order of quantised inputs: exact where the loss is quadratic, near what is measured where it is not."""

import math

import pytest
import torch
from torch import nn

from hf_lossless.calibration.statistics import LayerStatistics, Moments, calibrate, layer_input, with_layer_input
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.activation_grid import (
    DYNAMIC_AXES,
    StaticGrid,
    dynamic_range,
    on_activation_grid,
    scale_and_zero,
)
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.plan import ActivationGrid
from hf_lossless.theories.quantised_inputs import (
    ActivationOption,
    activation_options,
    choose_activation,
    predicted_loss_change,
)

NOTHING = Moments(0.0, 0.0, 1)


def test_one_half_of_the_weighted_squares():
    sensitivity, errors = torch.rand(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    loop = sum(0.5 * s * e for s, e in zip(sensitivity.tolist(), errors.tolist(), strict=True))
    assert predicted_loss_change(sensitivity, errors) == pytest.approx(loop)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 5))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_divergence_that_is_measured(bits):
    """Labels drawn from the model's own classes: there the empirical Fisher matrix is the Hessian, on average."""
    model = network().eval().double()
    with torch.no_grad():
        model[5].weight *= 4
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2000, 2, 6, 6, generator=generator).double()
    with torch.no_grad():
        log_classes = model(images).log_softmax(-1)
    labels = torch.multinomial(log_classes.exp(), 1, generator=generator)[:, 0]
    layers = find_layers(model)
    calibration = calibrate(model, [(images, labels)], layers, batch_loss, activation_bits=(bits,))
    for layer in layers:
        static, dynamic = activation_options(calibration.layers[layer.name], (bits,))
        assert (static.grid.range, dynamic.grid.range) == ("static", "dynamic")
        for option in (static, dynamic):

            def quantised(module, arguments, keywords, option=option, kind=layer.kind):
                values = layer_input(arguments, keywords)
                ends = dynamic_range(values, DYNAMIC_AXES[kind])
                scale, zero = scale_and_zero(*ends, bits)
                if option.static is not None:
                    scale, zero = option.static.scale, option.static.zero
                return with_layer_input(on_activation_grid(values, scale, zero, bits), arguments, keywords)

            with layer.module.register_forward_pre_hook(quantised, with_kwargs=True), torch.no_grad():
                changed = model(images).log_softmax(-1)
            divergence = (log_classes.exp() * (log_classes - changed)).sum(-1).mean().item()
            assert 0.6 < option.loss_change / divergence < 1.6, (layer.name, option, divergence)


def test_options_come_narrowest_first_and_more_bits_cost_less():
    model = network().eval()
    data = [(torch.randn(20, 2, 6, 6), torch.arange(20) % 5)]
    statistics = calibrate(model, data, find_layers(model), batch_loss, activation_bits=(8, 4, 6)).layers["3"]
    options = activation_options(statistics, (8, 4, 6))
    assert [(option.grid.bits, option.grid.range) for option in options] == [
        (bits, range) for bits in (4, 6, 8) for range in ("static", "dynamic")
    ]
    for kind in (0, 1):
        changes = [option.loss_change for option in options[kind::2]]
        assert changes == sorted(changes, reverse=True) and changes[-1] > 0


def test_no_statistics_no_options():
    assert activation_options(LayerStatistics(0, None, NOTHING), (4, 8)) == []
    model = nn.Sequential(nn.Linear(4, 3))
    statistics = calibrate(model, [(torch.randn(5, 4), torch.arange(5) % 3)], find_layers(model), batch_loss)
    assert activation_options(statistics.layers["0"], ()) == []


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_constant_inputs_cost_nothing(value):
    model = nn.Sequential(nn.Linear(4, 3))
    data = [(torch.full((5, 4), value), torch.arange(5) % 3)]
    statistics = calibrate(model, data, find_layers(model), batch_loss, activation_bits=(2,)).layers["0"]
    assert all(option.loss_change == pytest.approx(0, abs=1e-12) for option in activation_options(statistics, (2,)))


def option(bits: int, range: str, loss_change: float) -> ActivationOption:
    static = StaticGrid(torch.ones(1), torch.zeros(1, dtype=torch.uint8)) if range == "static" else None
    return ActivationOption(ActivationGrid(bits=bits, range=range), loss_change, static)


OPTIONS = [option(4, "static", 0.4), option(4, "dynamic", 0.2), option(8, "static", 0.02), option(8, "dynamic", 0.01)]


@pytest.mark.parametrize("may_stay_float", [True, False])
@pytest.mark.parametrize(
    ("weight_change", "chosen"),
    [(1.0, 0), (0.4, 0), (0.3, 1), (0.1, 2), (0.02, 2), (0.015, 3), (0.001, None), (0.0, None)],
)
def test_activations_cost_at_most_what_the_weight_costs(weight_change, chosen, may_stay_float):
    found = choose_activation(OPTIONS, weight_change, may_stay_float=may_stay_float)
    if chosen is not None:
        assert found is OPTIONS[chosen]
    else:
        assert found is (None if may_stay_float else OPTIONS[3])


def test_where_nothing_can_be_quantised_inputs_stay():
    assert choose_activation([], math.inf, may_stay_float=False) is None
