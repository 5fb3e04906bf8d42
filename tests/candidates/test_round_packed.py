"""Codes of a plan: each layer as it would be alone, whatever it is batched with."""

import pytest
import torch
from torch import Tensor, nn

from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.candidates import round_packed as module_under_test
from hf_lossless.candidates.damping import FEEDBACK, FEEDBACK_OF_EMBEDDINGS
from hf_lossless.candidates.feedback import quantise_in_metric
from hf_lossless.candidates.round_packed import round_with_feedback
from hf_lossless.candidates.uniform import on_grid, quantise
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.grid import dequantise
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.plan import Grid, LayerPlan

VOCABULARY, WIDTH = 19, 12


class Model(nn.Module):
    """Two layers of one shape, one of another, a convolution in groups, an embedding, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.conv = nn.Embedding(VOCABULARY, WIDTH), nn.Conv2d(2, 4, (1, 3), groups=2, padding=(0, 1))
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.idle = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        hidden = self.conv(hidden.view(len(ids), 2, 1, WIDTH)).mean((1, 2))
        return self.head(torch.relu(self.second(torch.relu(self.first(hidden)))))


def prepared() -> tuple[dict[str, Layer], Calibration]:
    model = Model().eval()
    ids = torch.randint(0, VOCABULARY, (24, 2), generator=torch.Generator().manual_seed(1))
    batches = [(part, torch.arange(len(part)) % 3) for part in ids.split(8)]
    layers = find_layers(model)
    return {layer.name: layer for layer in layers}, calibrate(model, batches, layers, batch_loss, curvature=True)


def planned(layer: Layer, bits: int, **settings) -> LayerPlan:
    grid = Grid(bits=bits, **{"rounding": "feedback", "scale_dtype": "float32", **settings})
    return LayerPlan(kind="grid", grid=grid, cost_bytes=1, predicted_loss_change=0.0, tied=layer.tied)


KEPT = LayerPlan(kind="kept", cost_bytes=1, predicted_loss_change=0.0)


@pytest.mark.parametrize("largest_batch", [1, 2**24], ids=["one-by-one", "together"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_each_layer_as_it_is_alone(symmetric, largest_batch, monkeypatch):
    monkeypatch.setattr(module_under_test, "_LARGEST_BATCH", largest_batch)
    layers, calibration = prepared()
    bits = {"embedding": 3, "conv": 4, "first": 2, "second": 4, "head": 3}
    plans = {name: planned(layers[name], width, group_size=5, symmetric=symmetric) for name, width in bits.items()}
    plans["idle"] = KEPT
    found = round_with_feedback(list(layers.values()), plans, calibration)
    assert found.keys() == bits.keys()
    for name, one in found.items():
        matrix, columns = layers[name].matrix.detach(), calibration.layers[name].curvature.columns
        damping = FEEDBACK_OF_EMBEDDINGS if name == "embedding" else FEEDBACK
        [[expected]] = quantise_in_metric(matrix[None], [[plans[name].grid]], columns[None], damping)
        assert one.grid == plans[name].grid
        assert torch.equal(one.codes, expected.codes)
        torch.testing.assert_close(one.scales, expected.scales)
        assert not one.scales.requires_grad


def test_only_what_is_rounded_by_feedback():
    layers, calibration = prepared()
    plans = dict.fromkeys(layers, KEPT)
    plans["second"] = planned(layers["second"], 4, rounding="nearest")
    assert round_with_feedback(list(layers.values()), plans, calibration) == {}
    plans["first"] = planned(layers["first"], 4)
    assert list(round_with_feedback(list(layers.values()), plans, calibration)) == ["first"]


def test_layers_with_a_diagonal_metric_beside_those_with_a_full_one(monkeypatch):
    """A side beyond `LARGEST_FACTOR` keeps its diagonal only; its weights are rounded to nearest, with other scales."""
    monkeypatch.setattr("hf_lossless.calibration.curvature.LARGEST_FACTOR", 6)
    layers, calibration = prepared()
    names = ["first", "second", "conv"]
    assert [calibration.layers[name].curvature.columns.ndim for name in names] == [1, 1, 2]
    plans = {**dict.fromkeys(layers, KEPT), **{name: planned(layers[name], 3) for name in names}}
    found = round_with_feedback(list(layers.values()), plans, calibration)
    for name in names[:2]:
        columns = calibration.layers[name].curvature.columns
        expected = quantise(layers[name].matrix, plans[name].grid, columns + FEEDBACK * columns.mean())
        assert torch.equal(found[name].codes, expected.codes)


def test_it_lowers_the_cost_on_the_calibration_rows():
    layers, calibration = prepared()
    plans = {**dict.fromkeys(layers, KEPT), **{name: planned(layers[name], 3) for name in ("first", "second", "head")}}
    for name, one in round_with_feedback(list(layers.values()), plans, calibration).items():
        matrix, columns = layers[name].matrix.detach(), calibration.layers[name].curvature.columns
        errors = dequantise(one.codes, one.scales, one.zeros, one.grid), on_grid(matrix, plans[name].grid)
        fed_back, nearest = (((error - matrix) @ columns * (error - matrix)).sum() for error in errors)
        assert fed_back < 0.7 * nearest
