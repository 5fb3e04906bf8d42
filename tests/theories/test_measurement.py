"""The measured change of the loss, and a model that is as it was."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_lossless.calibration.statistics import calibrate
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import find_layers
from hf_lossless.theories.problem import Prediction, Problem, measured_change


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.conv1d, self.linear = nn.Embedding(9, 6), Conv1D(8, 6), nn.Linear(8, 3)
        self.conv2d = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv2d(self.embedding(ids)[:, None])[:, 0])
        return self.linear(torch.tanh(self.conv1d(hidden.mean(1))))


def problem(loss=batch_loss) -> Problem:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randint(0, 9, (rows, 4), generator=generator), torch.arange(rows) % 3) for rows in (5, 2)]
    model = Model().eval()
    layers = find_layers(model)
    return Problem(model, batches, loss, layers, calibrate(model, batches, layers, loss), {})


@pytest.mark.parametrize("index", range(4), ids=["embedding", "conv1d", "linear", "conv2d"])
def test_the_change_and_nothing_else(index):
    asked = problem()
    layer = asked.layers[index]
    state = {name: value.clone() for name, value in asked.model.state_dict().items()}
    error = 0.3 * torch.randn(layer.matrix.shape, generator=torch.Generator().manual_seed(1))
    change = measured_change(asked, layer, error)
    assert all(torch.equal(value, state[name]) for name, value in asked.model.state_dict().items())
    ids, targets = (torch.cat(parts) for parts in zip(*asked.batches, strict=True))
    with torch.no_grad():
        before = F.cross_entropy(asked.model(ids), targets).item()
        layer.weight.add_(error.T if layer.kind == "conv1d" else error.view(layer.weight.shape))
        assert change == pytest.approx(F.cross_entropy(asked.model(ids), targets).item() - before, abs=1e-6)
    assert abs(change) > 1e-4


def test_no_error_is_no_change():
    asked = problem()
    for layer in asked.layers:
        assert measured_change(asked, layer, torch.zeros(layer.matrix.shape)) == pytest.approx(0, abs=1e-7)


def test_one_forward_pass():
    calls = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return batch_loss(model, batch)

    asked = problem(loss)
    calls.clear()
    measured_change(asked, asked.layers[0], torch.zeros(asked.layers[0].matrix.shape))
    assert calls == [False, False]  # one of each batch, no gradient


def test_a_loss_that_overflows():
    asked = problem()
    layer = asked.layers[2]
    state = layer.weight.detach().clone()
    change = measured_change(asked, layer, torch.full(layer.matrix.shape, torch.inf))
    assert not math.isfinite(change) and not Prediction(change).usable
    assert torch.equal(layer.weight, state)


@pytest.mark.parametrize(("change", "usable"), [(0.0, True), (-3.0, True), (math.inf, False), (math.nan, False)])
def test_usable(change, usable):
    assert Prediction(change).usable == usable
