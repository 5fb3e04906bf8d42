"""Calibration data that say little: compress() works all the same, or ends with an error that says what is wrong."""

import logging
import math

import pytest
import torch
from tiny_models import TINY_MODELS
from torch import Tensor, nn

from hf_lossless import LosslessCompressionConfig, compress
from hf_lossless.compression import CompressionResult
from hf_lossless.data.batches import batch_loss
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
