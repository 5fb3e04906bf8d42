"""Calibration data that say little: compress() works all the same, or ends with an error that says what is wrong."""

import copy
import logging
import math
import re

import pytest
import torch
import transformers as hf
from tiny_models import TINY_MODELS
from torch import Tensor, nn

from hf_lossless import LosslessCompressionConfig, compress
from hf_lossless.compression import CompressionResult
from hf_lossless.config import THEORIES
from hf_lossless.data.batches import LossFunction, batch_loss
from hf_lossless.errors import LosslessError, UnreachableTargetError
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.modules.base import CompressedModule

FEATURES, CLASSES = 24, 4
RANKS = pytest.mark.parametrize("ranks", [None, "auto"], ids=["widths", "ranks"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 48), nn.ReLU(), nn.BatchNorm1d(48), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, CLASSES)
    ).eval()


def batches_of(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(random(rows, FEATURES, seed=index), torch.arange(rows) % CLASSES) for index, rows in enumerate(sizes)]


def config_of(ranks=None, **settings) -> LosslessCompressionConfig:
    return LosslessCompressionConfig(**{"ratio": 2.5, "ranks": ranks, "group_size": 16, **settings})


def compressed(model: nn.Module, batches: list, config: LosslessCompressionConfig, **settings) -> CompressionResult:
    """With everything finite, on the calibration rows and on others."""
    result = compress(model, batches, config, **settings)
    assert math.isfinite(result.measured_loss_change) and math.isfinite(result.plan.predicted_loss_change)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    with torch.no_grad():
        assert torch.isfinite(model(random(5, FEATURES, seed=99))).all()
    if config.ratio is not None:
        assert result.ratio >= config.ratio
        assert any(isinstance(module, CompressedModule) for module in model.modules())
    return result


POOR = {
    "one-row": batches_of(1),
    "one-row-twice": [(random(1, FEATURES), torch.tensor([2]))] * 2,
    "one-row-many-times": [(random(1, FEATURES).expand(8, -1), torch.full((8,), 2))] * 4,
    "batches-of-one-row": batches_of(1, 1, 1),
    "one-class": [(inputs, torch.zeros_like(targets)) for inputs, targets in batches_of(16, 16, 8)],
    "zeros": [(torch.zeros(8, FEATURES), targets) for _, targets in batches_of(8, 8)],
    "constant": [(torch.full((8, FEATURES), 3.0), targets) for _, targets in batches_of(8, 8)],
    "dead-channels": [(inputs * (torch.arange(FEATURES) < 5), targets) for inputs, targets in batches_of(16, 16)],
    "one-channel": [(inputs * (torch.arange(FEATURES) < 1), targets) for inputs, targets in batches_of(16, 16)],
    "huge": [(inputs * 1e6, targets) for inputs, targets in batches_of(16, 16)],
    "tiny": [(inputs * 1e-12, targets) for inputs, targets in batches_of(16, 16)],
    "outliers": [(inputs * 10.0 ** (torch.arange(FEATURES) % 8), targets) for inputs, targets in batches_of(16, 16)],
}


@pytest.mark.parametrize(("ranks", "symmetric"), [(None, True), ("auto", False)], ids=["symmetric", "asymmetric-ranks"])
@pytest.mark.parametrize("rows", POOR)
def test_rows_without_variety(rows, ranks, symmetric):
    # Inputs of zero leave nothing of the first layer to judge, which is kept then.
    ratio = 1.3 if rows == "zeros" else 2.5
    result = compressed(network(), POOR[rows], config_of(ranks, symmetric=symmetric, ratio=ratio))
    assert rows != "zeros" or result.plan.layers["0"].kind == "kept"


@pytest.mark.parametrize("rows", ["one-row", "one-class", "zeros", "dead-channels", "huge"])
def test_a_budget_on_rows_without_variety(rows):
    result = compressed(network(), POOR[rows], config_of(ratio=None, loss_budget=0.01))
    assert result.plan.predicted_loss_change <= 0.01


@RANKS
def test_a_layer_whose_inputs_are_all_zero(ranks):
    """Behind dead units: a change of it is not seen, and it is kept."""
    model = network()
    model[3].bias.data.fill_(-1e4)
    result = compressed(model, batches_of(16, 16), config_of(ranks, ratio=None, loss_budget=1.0))
    assert result.plan.layers["5"].kind == "kept"


@RANKS
def test_units_that_are_dead(ranks):
    """A has rows of zeros in the layer behind them."""
    model = network()
    model[0].bias.data[::2] = -1e4
    model[2] = nn.Identity()
    compressed(model, batches_of(16, 16), config_of(ranks))


@RANKS
@pytest.mark.parametrize("dead", ["even", "odd"])
def test_a_half_that_has_no_part_in_the_loss(dead, ranks):
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return batch_loss(model, batch[:2]) * batch[2].mean()

    batches = [
        (*batch, torch.full((len(batch[1]),), float(index % 2 == (dead == "even"))))
        for index, batch in enumerate(batches_of(12, 12, 12, 12))
    ]
    compressed(network(), batches, config_of(ranks), loss=loss)


class Idle(nn.Module):
    """One layer that never runs, and one that runs on nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.idle, self.empty = network(), nn.Linear(8, 8), nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs) + self.empty(inputs[:0]).sum(0)


@RANKS
def test_a_layer_that_is_never_reached_is_kept_and_said(ranks, caplog):
    model = Idle().eval()
    before = model.idle.weight.detach().clone()
    with caplog.at_level(logging.WARNING, "hf_lossless"):
        result = compressed(model, batches_of(16, 16), config_of(ranks))
    for name in ("idle", "empty"):
        layer = result.plan.layers[name]
        assert (layer.kind, layer.predicted_loss_change) == ("kept", 0)
        assert any(name in record.getMessage() for record in caplog.records)
    assert type(model.idle) is nn.Linear and torch.equal(model.idle.weight, before)


def known_by_heart() -> nn.Sequential:
    """Scores so far apart that the softmax is exact, and with the right label the gradient zero."""
    model = network()
    model[5].weight.data.zero_()
    model[5].bias.data.copy_(torch.tensor([0.0, 0.0, 1000.0, 0.0]))
    return model


@RANKS
def test_gradients_that_are_all_zero(ranks):
    """To the default theory a change of anything costs nothing, which cannot be: everything is kept."""
    batches = [(inputs, torch.full_like(targets, 2)) for inputs, targets in batches_of(8, 8)]
    result = compressed(known_by_heart(), batches, config_of(ranks, ratio=None, loss_budget=0.5))
    assert {layer.kind for layer in result.plan.layers.values()} == {"kept"}
    model = known_by_heart()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LosslessError, match=r"ratio=2\.5 cannot be reached|gradient"):
        compress(model, batches, config_of(ranks))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_gradients_that_are_all_zero_are_named():
    """The remedy is other rows, and not narrower widths."""
    batches = [(inputs, torch.full_like(targets, 2)) for inputs, targets in batches_of(8, 8)]
    with pytest.raises(LosslessError, match="gradient"):
        compress(known_by_heart(), batches, config_of())


@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "gpt2"])
def test_architectures_on_one_row(name):
    tiny = TINY_MODELS[name]
    model, batch = tiny.build(), tiny.batch(rows=1)
    result = compress(model, [batch], LosslessCompressionConfig(ratio=1.5, bits=(2, 4, 8)))
    assert result.ratio >= 1.5 and math.isfinite(result.measured_loss_change)
    with torch.no_grad():
        assert torch.isfinite(model(**tiny.inputs()).logits).all()


def test_wide_layers_on_one_row():
    """The second moments have one direction, and the damping must do for all others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    for inputs in (torch.ones(1, 768), random(1, 768) * (1 + 1e3 * (torch.arange(768) == 7))):
        twin = nn.Sequential(*(nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 3))).eval()
        twin.load_state_dict(model.state_dict())
        result = compress(twin, [(inputs, torch.tensor([1]))], LosslessCompressionConfig(ratio=5, bits=(2, 3, 4)))
        assert result.ratio >= 5 and math.isfinite(result.measured_loss_change)


def test_a_ratio_that_cannot_be_had_when_much_is_never_reached():
    model = Idle().eval()
    model.idle = nn.Linear(500, 500)
    with pytest.raises(UnreachableTargetError, match="ratio=3 cannot be reached"):
        compress(model, batches_of(8, 8), config_of(ratio=3))
    assert [type(layer.module) for layer in find_layers(model)] == [nn.Linear] * 5


class Times(nn.Module):
    """Multiplication by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        return values * self.factor


def faint(before: float = 1.0, between: float = 1.0, after: float = 1.0) -> nn.Sequential:
    """A network whose signals are multiplied by these numbers on their way."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(Times(before), nn.Linear(FEATURES, 48, bias=False), Times(between), nn.ReLU()),
        *(nn.Linear(48, 40), nn.ReLU(), Times(after), nn.Linear(40, CLASSES)),
    ).eval()


EVERY_WAY = {
    **{theory: {"theory": theory} for theory in THEORIES},
    **{f"{theory}-ranks": {"theory": theory, "ranks": "auto"} for theory in THEORIES},
    "entropy": {"storage": "entropy"},
    "both-ranks": {"storage": ("fixed", "entropy"), "ranks": "auto"},
    "inputs": {"activation_bits": (8, None)},
}


@pytest.mark.parametrize("power", [-110, 100], ids="2^{}".format)
@pytest.mark.parametrize("way", EVERY_WAY)
def test_the_size_of_signals_makes_no_difference(way, power):
    """Inputs multiplied by a power of two, and what comes of them divided by it: the same model, to the last bit."""
    states = []
    for factor in (1.0, 2.0**power):
        model = faint(factor, 1 / factor)
        result = compressed(model, batches_of(12, 12, 12, 12), config_of(**EVERY_WAY[way]))
        states.append((model.state_dict(), result.plan.predicted_loss_change))
    (plain, predicted), (state, prediction) = states
    if way != "inputs":  # whose ranges are as large as the inputs
        assert state.keys() == plain.keys() and all(torch.equal(value, plain[name]) for name, value in state.items())
    assert prediction == pytest.approx(predicted, rel=1e-3)


def scaled_by(factor: float) -> LossFunction:
    return lambda model, batch: batch_loss(model, batch) * factor


@pytest.mark.parametrize("power", [-100, -60, 60], ids="2^{}".format)
@pytest.mark.parametrize("ranks", [None, "auto"])
def test_the_unit_of_the_loss_makes_no_difference(ranks, power):
    states = []
    for factor in (1.0, 2.0**power):
        model = faint()
        compressed(model, batches_of(12, 12, 12, 12), config_of(ranks), loss=scaled_by(factor))
        states.append(model.state_dict())
    assert all(torch.equal(value, states[0][name]) for name, value in states[1].items())


def mixed(inputs: Tensor, dim: int, exponents: Tensor) -> Tensor:
    return inputs * 10.0 ** exponents.view(-1, 1) if dim == 0 else inputs * 10.0**exponents


CHANNELS, ROWS = (torch.arange(FEATURES) * 7) % 61 - 30.0, (torch.arange(12) * 11) % 51 - 40.0
SIGNALS = {
    "inputs-vanish": (faint(1e-44), batches_of(12, 12), 1.0),
    "gradients-vanish": (faint(), batches_of(12, 12), 1e-40),
    "gradients-nearly-vanish": (faint(), batches_of(12, 12), 1e-20),
    "both-vanish": (faint(1e-20), batches_of(12, 12), 1e-20),
    "on-the-way": (faint(1.0, 1e-30, 1e-30), batches_of(12, 12), 1.0),
    "one-layer": (faint(1.0, 1e-30, 1e30), batches_of(12, 12), 1.0),
    "last-layer": (faint(1.0, 1.0, 1e-38), batches_of(12, 12), 1.0),
    "huge-inputs": (faint(1e30, 1e-30), batches_of(12, 12), 1.0),
    "huge-loss": (faint(), batches_of(12, 12), 1e30),
    "huge-loss-of-tiny-inputs": (faint(1e-20), batches_of(12, 12), 1e20),
    "channels": (faint(), [(mixed(x, 1, CHANNELS), y) for x, y in batches_of(12, 12)], 1.0),
    "rows": (faint(), [(mixed(x, 0, ROWS), y) for x, y in batches_of(12, 12)], 1.0),
    "batches": (
        faint(),
        [(x * size, y) for size, (x, y) in zip((1e-30, 1, 1e-10), batches_of(9, 9, 9), strict=True)],
        1,
    ),
}


IN_FLOAT32 = [(way, torch.float32) for way in EVERY_WAY]
IN_HALF = [(way, dtype) for way in ("both-ranks", "lod-ranks", "hawq") for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("way", "dtype"), [*IN_FLOAT32, *IN_HALF], ids=str)
@pytest.mark.parametrize("signals", SIGNALS)
def test_a_plan_or_an_error_by_name(signals, way, dtype):
    model, batches, factor = SIGNALS[signals]
    model = copy.deepcopy(model).to(dtype)
    state = copy.deepcopy(model.state_dict())
    try:
        result = compress(
            model,
            [(inputs.to(dtype), targets) for inputs, targets in batches],
            config_of(**EVERY_WAY[way]),
            loss=batch_loss if factor == 1 else scaled_by(factor),
        )
    except LosslessError:
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    else:
        assert math.isfinite(result.measured_loss_change) and math.isfinite(result.plan.predicted_loss_change)
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        assert result.ratio >= 2.5


@pytest.mark.parametrize("storage", ["fixed", "entropy"])
@pytest.mark.parametrize("gap", [30, 46, 60, 100])
def test_rows_known_by_heart(gap, storage):
    """Scores so far apart that the gradients, which are not zero, have squares that float32 does not hold."""
    model = TINY_MODELS["bert"].build()
    with torch.no_grad():
        model.classifier.weight.mul_(0.01)
        model.classifier.bias.copy_(torch.tensor([gap, 0.0, 0.0]))
    batch = TINY_MODELS["bert"].batch(rows=12)
    batch["labels"] = torch.zeros_like(batch["labels"])
    config = LosslessCompressionConfig(ratio=2, storage=storage)
    if gap == 100:  # below the least number of float32
        with pytest.raises(UnreachableTargetError, match="the gradient of the loss is zero, or underflows to zero"):
            compress(model, [batch], config)
    else:
        assert compress(model, [batch], config).ratio >= 2


@pytest.mark.parametrize("seed", [0, 2, 6])
def test_signals_that_fade_from_layer_to_layer(seed, caplog):
    """A MobileNet as transformers makes it: activations of 1e-27, which no batch norm has learnt to bring back."""
    torch.manual_seed(seed)
    config = hf.MobileNetV2Config(depth_multiplier=0.1, image_size=32, num_labels=3)
    model = hf.MobileNetV2ForImageClassification(config).eval()
    batches = [{"pixel_values": random(4, 3, 32, 32, seed=i), "labels": torch.tensor([0, 1, 2, 0])} for i in range(2)]
    with caplog.at_level(logging.WARNING, "hf_lossless"):
        result = compress(model, batches, LosslessCompressionConfig(ratio=3, ranks="auto"))
    assert result.ratio >= 3 and math.isfinite(result.measured_loss_change)
    assert result.plan.predicted_loss_change > 0 and "kept as they are" not in caplog.text


def test_a_gradient_that_underflows_is_named(caplog):
    """In float16 the first layer's inputs and gradients are there, and their products are not."""
    batches = [(inputs * 1e-4, targets) for inputs, targets in batches_of(16, 16)]
    in_half = [(inputs.half(), targets) for inputs, targets in batches]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch_loss(model, batch) * 1e-2

    budget = config_of(ratio=None, loss_budget=1.0)
    with caplog.at_level(logging.WARNING, "hf_lossless"):
        result = compress(network().half(), in_half, budget, loss=loss)
    assert [name for name, layer in result.plan.layers.items() if layer.kind == "kept"] == ["0"]
    message = r"the gradient of the loss underflows there \(float16 .*\): 0\. Load the model in a wider dtype, or check"
    assert re.search(message, caplog.text) and "no calibration row reaches" not in caplog.text
    with pytest.raises(
        UnreachableTargetError,
        match=r"is zero, or underflows to zero, for '0' and 0 other layer\(s\), which are kept for it",
    ):
        compress(network().half(), in_half, config_of(ratio=6), loss=loss)
    wider = compress(network(), batches, budget, loss=loss)
    assert all(layer.kind != "kept" for layer in wider.plan.layers.values())
