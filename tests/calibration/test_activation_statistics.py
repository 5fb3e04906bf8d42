"""The histogram and its weights against plain loops over rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lossless.calibration.activations import NUM_BINS, bin_edges, bin_of
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.activation_grid import DYNAMIC_AXES, dynamic_range, on_activation_grid, scale_and_zero
from hf_lossless.storage.layers import find_layers

WIDTHS = (4, 8)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_value_lies_in_its_bin(value):
    lower, upper = bin_edges()
    index = bin_of(torch.tensor(value))
    assert 0 <= index < NUM_BINS
    assert lower[index] <= value <= upper[index]
    if 1e-30 < abs(value) < 3e38:  # the last bin has no upper edge
        assert upper[index] - lower[index] <= 0.126 * abs(value)


def test_bins_follow_each_other():
    lower, upper = bin_edges()
    finite = lower.isfinite() & upper.isfinite()
    lower, order = lower[finite].sort()
    assert (lower < upper[finite][order]).all() and torch.equal(upper[finite][order][:-1], lower[1:])


def test_strided_and_half_precision_values():
    values = torch.randn(4, 6).to(torch.bfloat16).T
    assert torch.equal(bin_of(values), bin_of(values.float().contiguous()))


class Model(nn.Module):
    """A convolution, a layer on each of its pixels, one whose positions the loss sees in part, and one that idles."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pixels = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 6)
        self.head, self.idle = nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.pixels(self.conv(images).relu().flatten(2).mT)
        return self.head(pixels.tanh())[:, 0]


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 2, 4, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for size in sizes
    ]


def rows_of(model: Model, name: str, data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Input of a layer and gradient of the row's own loss with respect to it, row by row."""
    found = []

    def watch(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        found.append(arguments[0].detach().requires_grad_())
        return (found[-1],)

    with model.get_submodule(name).register_forward_pre_hook(watch):
        rows = []
        for images, labels in data:
            for image, label in zip(images, labels, strict=True):
                nn.functional.cross_entropy(model(image[None]), label[None]).backward()
                rows.append((found[-1].detach(), found[-1].grad))
    return rows


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("name", ["conv", "pixels", "head"])
def test_against_row_by_row_gradients(name, sizes):
    model, data = Model().eval(), batches(*sizes)
    layers = find_layers(model)
    found = calibrate(model, data, layers, batch_loss, activation_bits=WIDTHS).layers[name].activations
    axes = DYNAMIC_AXES["conv2d" if name == "conv" else "linear"]
    counts, sensitivity = torch.zeros(NUM_BINS).double(), torch.zeros(NUM_BINS).double()
    dynamic = dict.fromkeys(WIDTHS, 0.0)
    rows = rows_of(model, name, data)
    for values, gradient in rows:
        for value, slope in zip(values.flatten(), gradient.flatten(), strict=True):
            counts[bin_of(value)] += slope != 0
            sensitivity[bin_of(value)] += slope.double() ** 2 / len(rows)
        for bits in WIDTHS:
            error = on_activation_grid(values, *scale_and_zero(*dynamic_range(values, axes), bits), bits) - values
            dynamic[bits] += 0.5 * (gradient * error).square().sum().item() / len(rows)
    assert torch.equal(found.counts, counts)
    torch.testing.assert_close(found.sensitivity, sensitivity, rtol=1e-4, atol=1e-12)
    assert found.dynamic == pytest.approx(dynamic, rel=1e-3)


def test_positions_that_the_loss_does_not_see_are_not_counted():
    model, data = Model().eval(), batches(4)
    found = calibrate(model, data, find_layers(model), batch_loss, activation_bits=WIDTHS).layers
    assert found["head"].activations.counts.sum() == 4 * 6  # one of 16 positions
    assert found["head"].inputs.values.count == 4 * 16 * 6
    idle = found["idle"].activations
    assert not idle.counts.any() and not idle.sensitivity.any() and not any(idle.dynamic.values())


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.decoder = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.body(self.embedding(ids)))


def test_embeddings_and_tied_layers_have_none():
    model = Language()
    ids = torch.arange(6)
    calibration = calibrate(model, [(ids, ids)], find_layers(model), batch_loss, activation_bits=(8,))
    assert {name: layer.activations is not None for name, layer in calibration.layers.items()} == {
        "embedding": False,
        "body": True,
    }
    assert calibration.without_tensors().layers["body"].activations is None


def test_only_where_asked():
    model, data = Model().eval(), batches(2)
    plain = calibrate(model, data, find_layers(model), batch_loss)
    asked = calibrate(model, data, find_layers(model), batch_loss, activation_bits=(8,))
    assert all(layer.activations is None for layer in plain.layers.values())
    assert plain == asked  # tensors are not compared
    assert math.isfinite(asked.layers["conv"].activations.dynamic[8])
