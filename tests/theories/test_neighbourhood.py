"""U against losses whose Taylor series is known, against brute force, and the model as it was."""

import json
import math
import re
import zlib

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_lossless.calibration.perturbation import seeded_number
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.errors import CalibrationError, ConfigurationError
from hf_lossless.reports.pictures.neighbourhood import neighbourhood_figure
from hf_lossless.reports.tables import gap_tables, layer_table
from hf_lossless.storage.layers import find_layers
from hf_lossless.theories.neighbourhood import (
    ABSOLUTE_TOLERANCE,
    SIZES,
    LayerNeighbourhood,
    Neighbourhood,
    NoiseGap,
    NoiseResponse,
    evenly_spaced_layers,
    named_layers,
    neighbourhood,
)
from hf_lossless.theories.problem import Problem, measured_change


class Model(nn.Module):
    """Every kind of layer, smooth, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.conv1d, self.linear = nn.Embedding(9, 6), Conv1D(8, 6), nn.Linear(8, 3)
        self.conv2d = nn.Conv2d(1, 1, 3, padding=1)
        self.double().eval()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv2d(self.embedding(ids)[:, None])[:, 0])
        return self.linear(torch.tanh(self.conv1d(hidden.mean(1))))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """In the model's own dtype, where batch_loss takes float32."""
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(rows: tuple[int, ...] = (5, 2)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 9, (count, 4), generator=generator), torch.arange(count) % 3) for count in rows]


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum(1).mean() + model(batch).sum(1).mean()


def mean(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sum(1).mean()


def linear(rows: tuple[int, ...] = (4, 3)) -> tuple[nn.Module, list[Tensor]]:
    """One linear layer in float64, with inputs."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5)).double().eval(), [torch.randn(count, 6).double() for count in rows]


def weight_noise_of(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    number = seeded_number(seed, zlib.crc32(name.encode()), 0)
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).double()


def input_noise_of(name: str, shape: tuple[int, ...], batch: int, seed: int = 0) -> Tensor:
    number = seeded_number(seeded_number(seed, zlib.crc32(name.encode()), 1), batch)
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).double()


def test_a_quadratic_loss_has_two_orders_and_no_more():
    model, data = linear()
    [layer] = neighbourhood(model, data, find_layers(model), loss=square).layers
    noise, weight = weight_noise_of("0", (5, 6)), model[0].weight.detach()
    # f = mean |W x + b|^2 + ..., so that 1/2 d'Hd = mean |d x|^2 and 1/2 e'He = mean |W e|^2
    of_weight = (torch.cat(data) @ noise.T).square().sum(1).mean().item()
    errors = torch.cat([input_noise_of("0", batch.shape, place) for place, batch in enumerate(data)])
    of_input = (errors @ weight.T).square().sum(1).mean().item()
    for response, half_curvature in ((layer.weight, of_weight), (layer.inputs, of_input)):
        assert [gap.size for gap in response.gaps] == list(SIZES)
        for gap in response.gaps:
            assert gap.second == pytest.approx(half_curvature * gap.size**2, rel=1e-10)
            assert gap.first_order_gap == pytest.approx(half_curvature * gap.size**2, rel=1e-10, abs=1e-12)
            assert gap.second_order_gap < 1e-12
        assert response.second_order_until == SIZES[-1]


def test_a_linear_loss_has_one_order():
    model, data = linear()
    [layer] = neighbourhood(model, data, find_layers(model), loss=mean).layers
    for response in (layer.weight, layer.inputs):
        for gap in response.gaps:
            assert gap.second == 0 and abs(gap.measured) > 1e-6
            assert gap.first_order_gap < 1e-12
        assert response.first_order_until == response.second_order_until == SIZES[-1]


@pytest.mark.parametrize("index", range(4), ids=["embedding", "conv1d", "linear", "conv2d"])
def test_weights_against_brute_force(index):
    model = Model()
    layer = find_layers(model)[index]
    [found] = neighbourhood(model, batches(), [layer], loss=cross_entropy, sizes=[0.1]).layers
    noise = weight_noise_of(layer.name, layer.matrix.shape)
    calibration = calibrate(model, batches(), [layer], cross_entropy, gradients=True)
    problem = Problem(model, batches(), cross_entropy, [layer], calibration, {})
    [gap] = found.weight.gaps
    assert gap.measured == pytest.approx(measured_change(problem, layer, 0.1 * noise), abs=1e-7)
    assert gap.first == pytest.approx(0.1 * (calibration.layers[layer.name].gradient * noise).sum().item(), rel=1e-5)
    both = [measured_change(problem, layer, sign * 1e-2 * noise) for sign in (1, -1)]
    assert gap.second == pytest.approx(sum(both) / 2 * 100, rel=0.02)
    assert found.weight.rms == pytest.approx(layer.weight.detach().square().mean().sqrt().item())


def test_activations_against_brute_force():
    """By hand: each batch with its noise between conv1d and what goes into it."""
    model, size, small = Model(), 0.1, 1e-3
    layers = [layer for layer in find_layers(model) if layer.name == "conv1d"]

    def loss_at(position: float) -> float:
        total = 0.0
        for place, (ids, targets) in enumerate(batches()):
            hidden = torch.tanh(model.conv2d(model.embedding(ids)[:, None])[:, 0]).mean(1)
            hidden = hidden + position * input_noise_of("conv1d", hidden.shape, place)
            total += F.cross_entropy(model.linear(torch.tanh(model.conv1d(hidden))), targets, reduction="sum").item()
        return total / 7

    [found] = neighbourhood(model, batches(), layers, loss=cross_entropy, sizes=[size]).layers
    [gap] = found.inputs.gaps
    assert gap.measured == pytest.approx(loss_at(size) - loss_at(0), rel=1e-9)
    assert gap.first == pytest.approx(size * (loss_at(small) - loss_at(-small)) / (2 * small), rel=1e-5)
    curvature = (loss_at(small) - 2 * loss_at(0) + loss_at(-small)) / small**2
    assert gap.second == pytest.approx(size**2 / 2 * curvature, rel=1e-5)


def test_gaps_fall_with_their_order():
    """U1 as the square of the noise, U2 as its cube."""
    model = Model()
    found = neighbourhood(model, batches(), find_layers(model), loss=cross_entropy, sizes=[1e-3, 1e-2])
    for layer in found.layers:
        for response in (layer.weight, layer.inputs):
            if response is not None:
                small, large = response.gaps
                assert large.first_order_gap / small.first_order_gap == pytest.approx(100, rel=0.2)
                assert large.second_order_gap / small.second_order_gap == pytest.approx(1000, rel=0.3)


def test_integers_carry_no_noise():
    model = Model()
    found = neighbourhood(model, batches(), find_layers(model), loss=cross_entropy, sizes=[0.1])
    assert [layer.name for layer in found.layers if layer.inputs is None] == ["embedding"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding, self.head, self.idle = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False), nn.Linear(2, 2)
        self.head.weight = self.embedding.weight
        self.double().eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)).mean(1))


def test_a_tied_weight_moves_in_both_places_and_an_idle_one_moves_nothing():
    model = Tied()
    tied, idle = neighbourhood(model, batches(), find_layers(model), loss=cross_entropy, sizes=[0.1]).layers
    [gap] = tied.weight.gaps
    with torch.no_grad():
        [ids, targets] = [torch.cat(parts) for parts in zip(*batches(), strict=True)]
        before = F.cross_entropy(model(ids), targets).item()
        model.embedding.weight.add_(0.1 * weight_noise_of("embedding", (9, 6)))
        assert gap.measured == pytest.approx(F.cross_entropy(model(ids), targets).item() - before, rel=1e-9)
    assert tied.inputs is not None  # the head's
    assert idle.inputs is None
    assert [(gap.measured, gap.first, gap.second) for gap in idle.weight.gaps] == [(0, 0, 0)]


def test_the_model_is_as_it_was():
    model = Model()
    model.linear.weight.requires_grad_(False)
    model.conv1d.weight.grad = torch.ones_like(model.conv1d.weight)
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    neighbourhood(model, batches(), find_layers(model), loss=cross_entropy, sizes=[0.1])
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.linear.weight.requires_grad and model.conv1d.weight.requires_grad
    assert torch.equal(model.conv1d.weight.grad, torch.ones_like(model.conv1d.weight))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_model_is_as_it_was_after_an_error():
    model, calls = Model(), []
    weight = model.linear.weight

    def failing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        if model.linear.weight is not weight:
            raise RuntimeError("out of memory")
        return cross_entropy(model, batch)

    layers = [layer for layer in find_layers(model) if layer.name == "linear"]
    with pytest.raises(RuntimeError, match="out of memory"):
        neighbourhood(model, batches(), layers, loss=failing)
    assert calls and model.linear.weight is weight and weight.requires_grad


def test_seeds():
    model = Model()
    layers = find_layers(model)
    all_layers = neighbourhood(model, batches(), layers, loss=cross_entropy, sizes=[0.1], seed=5)
    assert neighbourhood(model, batches(), layers, loss=cross_entropy, sizes=[0.1], seed=5) == all_layers
    alone = neighbourhood(model, batches(), layers[2:3], loss=cross_entropy, sizes=[0.1], seed=5)
    assert alone.layers == all_layers.layers[2:3]  # a layer's noise does not depend on the others
    other = neighbourhood(model, batches(), layers[2:3], loss=cross_entropy, sizes=[0.1], seed=6)
    assert other.layers[0].weight.gaps != alone.layers[0].weight.gaps
    assert other.layers[0].inputs.gaps != alone.layers[0].inputs.gaps


def test_no_more_passes_than_promised():
    model, gradients, advanced = Model(), [], []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        gradients.append(torch.is_grad_enabled())
        return cross_entropy(model, batch)

    layers = find_layers(model)[1:3]
    data = batches((4,))
    neighbourhood(model, data, layers, loss=loss, sizes=[0.1, 0.01, 1e-3], advance=lambda: advanced.append(1))
    assert gradients.count(True) == 1 + 2 * 2
    assert gradients.count(False) == 1 + 2 * 2 * 3
    assert len(advanced) == 2


def response(*gaps: tuple[float, float, float, float]) -> NoiseResponse:
    return NoiseResponse(1.0, tuple(NoiseGap(*gap) for gap in gaps))


def test_where_an_order_ends():
    small = ABSOLUTE_TOLERANCE / 2
    assert response((0.1, 0, 2 * small, 0)).first_order_until == 0.1  # what does not matter is explained
    assert response((0.1, 1.0, 0.5, 0.0)).first_order_until == 0.1  # half of the change
    assert response((0.1, 1.0, 0.4, 0.0)).first_order_until is None
    assert response((0.1, 1.0, 0.4, 0.5)).second_order_until == 0.1
    assert response((0.1, 1.0, -1.0, 2.0)).second_order_until == 0.1
    # by chance right again at a larger size
    assert response((0.01, 1, 1, 0), (0.03, 1, 0, 0), (0.1, 1, 1, 0)).first_order_until == 0.01
    assert response((0.01, 1, 1, 0), (0.1, math.inf, 1, 0)).second_order_until == 0.01


def test_a_loss_that_overflows():
    model, data = linear()

    def exploding(model: nn.Module, batch: Tensor) -> Tensor:
        return (1e5 * (model(batch) - 1).square().mean()).exp().mean().log()

    model[0].weight.data.zero_()
    model[0].bias.data.fill_(1.0)
    found = neighbourhood(model, data, find_layers(model), loss=exploding, sizes=[1e-4, 10.0])
    gaps = found.layers[0].weight.gaps
    assert math.isfinite(gaps[0].measured) and gaps[1].measured == gaps[1].first_order_gap == math.inf
    assert Neighbourhood.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_json():
    model = Model()
    found = neighbourhood(model, batches(), find_layers(model), loss=cross_entropy, sizes=[0.1, 0.01])
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Neighbourhood.from_dict(values) == found
    assert values["num_examples"] == 7 and values["layers"]["embedding"]["inputs"] is None
    weight = values["layers"]["linear"]["weight"]
    assert [gap["size"] for gap in weight["gaps"]] == [0.01, 0.1]
    assert weight["gaps"][1]["second_order_gap"] == found.layers[2].weight.gaps[1].second_order_gap
    assert weight["first_order_until"] == found.layers[2].weight.first_order_until


def test_which_layers():
    model = Model()
    layers = find_layers(model)
    names = [layer.name for layer in layers]
    assert evenly_spaced_layers(layers) == layers
    assert [layer.name for layer in evenly_spaced_layers(layers, 2)] == [names[0], names[-1]]
    spread = evenly_spaced_layers(list(range(41)))
    assert len(set(spread)) == 8 and (spread[0], spread[-1]) == (0, 40)
    assert [layer.name for layer in named_layers(layers, ["linear", "conv*"])] == ["conv1d", "linear", "conv2d"]
    assert [layer.name for layer in named_layers(find_layers(Tied()), ["head"])] == ["embedding"]
    with pytest.raises(
        ConfigurationError, match=r"'conv3' names none of the model's 4 layers \(embedding, .*conv2d\)\."
    ):
        named_layers(layers, ["linear", "conv3"])


def test_what_cannot_be_used():
    model, data = linear()
    layers = find_layers(model)
    with pytest.raises(ConfigurationError, match="no layers"):
        neighbourhood(model, data, [], loss=mean)
    for sizes in ([], [0.0], [-0.1], [math.inf], [math.nan]):
        with pytest.raises(ConfigurationError, match=re.escape(f"noise sizes are {sizes}")):
            neighbourhood(model, data, layers, loss=mean, sizes=sizes)
    with pytest.raises(ConfigurationError, match=r"'0' is of torch.bfloat16.*in float32"):
        neighbourhood(model.bfloat16(), data, layers, loss=mean)
    with pytest.raises(CalibrationError, match="loss of calibration batch 1 of 2 is nan"):
        neighbourhood(*linear(), find_layers(model.float()), loss=lambda model, batch: model(batch).sum() * math.nan)


def test_a_model_without_second_derivatives_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(context, values):
            return values * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(context, gradient):
            return gradient * 2

    model, data = linear()
    with pytest.raises(CalibrationError, match="no second derivative: Once"):
        neighbourhood(model, data, find_layers(model), loss=lambda model, batch: Once.apply(model(batch)).mean())


def test_tables_and_plot(tmp_path):
    ends = response((1e-4, 2e-4, 1e-4, 0.0), (1e-1, 2.0, 1.5, 0.25)), response((1e-4, 1.0, 0, 0), (1e-1, 2, 0, 0))
    broken = response((1e-4, 1e-5, 1e-5, 0.0), (1e-1, math.inf, 1.5, 0.25))
    found = Neighbourhood(
        (
            LayerNeighbourhood("a", ends[0], None),
            LayerNeighbourhood("b", ends[1], ends[0]),
            LayerNeighbourhood("c", broken, broken),
        ),
        *(0.5, 7, 0),
    )
    console = Console(width=60, record=True)
    for table in (*gap_tables(found), layer_table(found)):
        console.print(table)
    said = console.export_text()
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in said.splitlines() if line[:1] in "│┃"]
    weights = rows.index(["noise", "change", "U1", "largest", "U2", "largest"])
    assert rows[weights + 1] == ["1e-01", "2.0e+00", "2.0e+00", "inf", "2.0e+00", "inf"]
    assert rows[weights + 2] == ["1e-04", "2.0e-04", "1.0e-04", "1.0e+00", "1.0e-04", "1.0e+00"]
    assert ["a", "weight", "1", "1e-01", "1e-01"] in rows
    assert ["b", "weight", "1", "< 1e-04", "< 1e-04"] in rows and ["", "input", "1", "1e-01", "1e-01"] in rows
    assert "…" not in said
    neighbourhood_figure(found).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    only_integers = Neighbourhood(found.layers[:1], 0.5, 7, 0)
    assert len(gap_tables(only_integers)) == 1
    neighbourhood_figure(only_integers).savefig(tmp_path / "plot.png")
