"""LLC's prediction against the lines of its Algorithm 1, written out slowly."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.calibration.statistics import calibrate
from hf_lossless.candidates.activations import activation_noise as activation_noise_of
from hf_lossless.candidates.grids import Candidate, propose_grids
from hf_lossless.candidates.uniform import quantise
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.grid import dequantise
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.plan import Grid
from hf_lossless.theories import llc
from hf_lossless.theories.llc import ERROR_MAX, predict, predicted_loss_change
from hf_lossless.theories.problem import Problem


@pytest.fixture(autouse=True)
def _no_noise_limit(monkeypatch):
    """The formula, whatever the size of the noise; see test_noise_limits for the refusals."""
    monkeypatch.setattr("hf_lossless.theories.noise_limits.SECOND_ORDER", float("inf"))


BITS = (2, 4, 16)


def change(**values: float) -> float:
    """One of P's terms, the other at zero."""
    zero = dict.fromkeys(
        ("input_change", "input_step", "input_noise", "weight_change", "weight_step", "weight_noise"), 0.0
    )
    return predicted_loss_change(**(zero | values))


def test_both_terms():
    """slope * ||e|| / sqrt(size) + fluc / scale * ||d|| / sqrt(size)"""
    values = {"input_change": -0.02, "input_step": 0.1, "input_noise": 0.03}
    values |= {"weight_change": 0.04, "weight_step": 0.2, "weight_noise": 0.05}
    assert predicted_loss_change(**values) == pytest.approx(0.02 / 0.1 * 0.03 + 0.04 / 0.2 * 0.05)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_small_fluctuation_is_not_counted(sign):
    below, at = (sign * factor * ERROR_MAX for factor in (0.999, 1.0))
    assert change(weight_change=below, weight_step=0.1, weight_noise=1.0) == 0
    assert change(weight_change=at, weight_step=0.1, weight_noise=1.0) == pytest.approx(ERROR_MAX / 0.1)
    # The input's term has no threshold.
    assert change(input_change=below, input_step=0.1, input_noise=1.0) == pytest.approx(0.999 * ERROR_MAX / 0.1)


def test_a_step_of_zero_means_no_noise():
    assert change(input_change=-3.0, input_noise=0.0) == 0
    assert change(weight_change=-3.0, weight_noise=0.0) == 0


class Model(nn.Module):
    """An embedding, a layer that is used twice, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.body, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids).mean(1)
        return self.head(torch.tanh(self.body(torch.tanh(self.body(hidden)))))


def batches_of(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(0, 11, (rows, 4), generator=generator), torch.randint(0, 3, (rows,), generator=generator))
        for rows in sizes
    ]


def prepared(model: nn.Module, batches, bits=BITS, group_size=4, loss=batch_loss):
    layers = find_layers(model)
    calibration = calibrate(model, batches, layers, loss)
    candidates = {
        layer.name: propose_grids(layer, calibration.layers[layer.name], bits, group_size, True) for layer in layers
    }
    return layers, calibration, candidates


def predicted(model, batches, layers, calibration, candidates, loss, seed, activation_noise=False, **keywords):
    """The numbers alone."""
    problem = Problem(model, batches, loss, layers, calibration, candidates, seed, activation_noise, **keywords)
    return {name: [one.loss_change for one in group] for name, group in predict(problem).items()}


def opposing(gradient):
    """Against the mean gradient, and negative where that is nothing but rounding."""
    return 1 if gradient.mean < -1e-6 * gradient.variance**0.5 else -1


def reference(model: Model, batches, calibration, candidates, seed: int, activations: bool) -> dict[str, list[float]]:
    """Algorithm 1: every layer, every width, one measurement of the loss for each noise."""

    def loss_of(model: nn.Module, before_batch=lambda index: None) -> float:
        rows = sum(len(targets) for _, targets in batches)
        total = 0.0
        with torch.no_grad():
            for index, (ids, targets) in enumerate(batches):
                before_batch(index)
                total += F.cross_entropy(model(ids), targets, reduction="sum").item() / rows
        return total

    clean = loss_of(model)
    table: dict[str, list[float]] = {}
    for position, (name, group) in enumerate(candidates.items()):
        module = model.get_submodule(name)
        statistics = calibration.layers[name]
        table[name] = []
        for candidate in group:
            if candidate.grid is None:
                table[name].append(0.0)
                continue
            bits, prediction = candidate.grid.bits, 0.0
            seed_of_layer = llc.seeded_number(seed, position)
            if activations and statistics.inputs is not None:
                noise = activation_noise_of(statistics.inputs, bits)  # line 7
                generator = torch.Generator()
                sign = opposing(statistics.inputs.gradient)

                def hook(module, arguments, step=noise.step, sign=sign, generator=generator):
                    return arguments[0] + sign * step * torch.randn(arguments[0].shape, generator=generator).abs()

                handle = module.register_forward_pre_hook(hook)
                noisy = loss_of(
                    model,
                    lambda index, g=generator, s=seed_of_layer: g.manual_seed(llc.seeded_number(s, index)),
                )
                handle.remove()
                prediction += abs(clean - noisy) / noise.step * noise.rms  # lines 8 and 17
            weight = module.weight.data.clone()
            quantised = quantise(weight, candidate.grid)
            generator = torch.Generator().manual_seed(seed_of_layer)
            sign = opposing(statistics.weight_gradient)
            scales = quantised.scales.float().abs()
            random = torch.randn(weight.shape, generator=generator).abs()
            for row, column in itertools.product(*map(range, weight.shape)):
                step = scales[row, column // (candidate.grid.group_size or weight.shape[1])]
                module.weight.data[row, column] += sign * step * random[row, column]
            fluctuation = abs(clean - loss_of(model))  # line 9
            module.weight.data = weight
            if fluctuation >= 1e-4:
                error = dequantise(quantised.codes, quantised.scales, None, quantised.grid) - weight
                scale = math.sqrt(scales.square().mean())
                prediction += fluctuation / scale * error.norm().item() / math.sqrt(error.numel())  # line 20
            table[name].append(prediction)
    return table


@pytest.mark.parametrize("activations", [False, True], ids=["weights", "weights-and-activations"])
@pytest.mark.parametrize("group_size", [None, 4], ids=["row", "g4"])
def test_predict_equals_the_slow_loop(activations, group_size):
    model, batches = Model(), batches_of((5, 3))
    layers, calibration, candidates = prepared(model, batches, group_size=group_size)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    predictions = predicted(model, batches, layers, calibration, candidates, batch_loss, 7, activations)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    expected = reference(model, batches, calibration, candidates, 7, activations)
    assert list(predictions) == list(expected)
    for name, group in expected.items():
        assert predictions[name] == pytest.approx(group, rel=1e-3, abs=1e-6)
        assert group[-1] == 0 and min(group) >= 0
    assert any(value > 0 for group in expected.values() for value in group)


def test_activation_noise_adds_the_inputs_term():
    model, batches = Model(), batches_of((6,))
    layers, calibration, candidates = prepared(model, batches)
    without, with_noise = (
        predicted(model, batches, layers, calibration, candidates, batch_loss, 0, counted) for counted in (False, True)
    )
    assert with_noise["embedding"] == without["embedding"]  # token ids are no real numbers
    for name in ("body", "head"):
        assert all(more > less for more, less in zip(with_noise[name][:-1], without[name][:-1], strict=True))
        assert with_noise[name][-1] == without[name][-1] == 0  # a kept layer


def test_the_seed_decides():
    model, batches = Model(), batches_of((6, 2))
    layers, calibration, candidates = prepared(model, batches)
    first, again, other = (
        predicted(model, batches, layers, calibration, candidates, batch_loss, seed, True) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_a_layer_that_was_not_reached_costs_nothing_to_keep():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(4, 4)})
    batches = [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model["used"](batch[0]), batch[1])

    layers, calibration, candidates = prepared(model, batches, bits=(2, 4), loss=loss)
    predictions = predicted(model, batches, layers, calibration, candidates, loss, 0)
    assert predictions["idle"] == [0.0]
    assert len(predictions["used"]) == 2


def test_advance_is_called_for_every_candidate():
    model, batches, calls = Model(), batches_of((4,)), []
    layers, calibration, candidates = prepared(model, batches)
    predicted(model, batches, layers, calibration, candidates, batch_loss, 0, advance=lambda: calls.append(1))
    assert len(calls) == sum(map(len, candidates.values())) == 9


# A loss that is linear in the weight and in the input: there the measured slope is the true derivative.


def linear_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """<w, A> with positive A, by way of a layer of one output."""
    return model(batch[0]).mean()


def linear_model(rows: int = 5) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]], Layer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 1, bias=False)).double()
    inputs = torch.rand(rows, 16, dtype=torch.float64) + 0.5
    return model, [(inputs, torch.zeros(rows))], find_layers(model)[0]


@pytest.mark.parametrize("bits", [2, 8], ids=lambda bits: f"{bits}bit")
def test_weight_slope_of_a_linear_loss_is_its_derivative(bits):
    model, batches, layer = linear_model()
    layers, calibration, candidates = prepared(model, batches, (bits,), None, linear_loss)
    ((prediction,),) = predicted(model, batches, layers, calibration, candidates, linear_loss, 0).values()
    (candidate,) = candidates[layer.name]
    random = torch.randn(1, 16, generator=torch.Generator().manual_seed(llc.seeded_number(0, 0))).abs()
    derivative = (batches[0][0].mean(0) * random).sum().item()  # of the loss along |random|
    assert prediction == pytest.approx(derivative * candidate.noise, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 8], ids=lambda bits: f"{bits}bit")
def test_input_slope_of_a_linear_loss_is_its_derivative(bits):
    model, batches, layer = linear_model()
    layers, calibration, _ = prepared(model, batches, (bits,), None, linear_loss)
    inputs = calibration.layers[layer.name].inputs
    torch.testing.assert_close(inputs.gradient.mean, model[0].weight.mean().item() / 5)
    # A grid with no noise of its own: only the input's term is left.
    candidates = {layer.name: [Candidate(Grid(bits=bits), cost_bytes=1)]}
    ((prediction,),) = predicted(model, batches, layers, calibration, candidates, linear_loss, 0, True).values()
    seed = llc.seeded_number(llc.seeded_number(0, 0), 0)
    random = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)).abs()
    derivative = abs((random.double() @ model[0].weight.T).mean().item())
    assert prediction == pytest.approx(derivative * activation_noise_of(inputs, bits).rms, rel=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["rising", "falling"])
def test_the_noise_opposes_the_gradient(sign):
    """Lines 10 to 15: a step of noise lowers a linear loss whatever the gradient's sign."""
    model, batches, _ = linear_model()
    layers, calibration, candidates = prepared(
        model, batches, (3,), None, lambda model, batch: sign * linear_loss(model, batch)
    )
    losses = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses.append(sign * linear_loss(model, batch))
        return losses[-1]

    predicted(model, batches, layers, calibration, candidates, loss, 0)
    assert len(losses) == 1 and losses[0].item() < calibration.loss
