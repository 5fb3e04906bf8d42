"""The curvature of drawn labels: the Fisher matrix of the model's own predictions."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from hf_lossless.calibration.model_labels import DRAWS, drawn_batches, with_fisher
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import find_layers

FEATURES, CLASSES = 4, 3


def softmax_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES).eval()


def batches_of(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """All of one class, so that the data's labels are not what the model predicts."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, FEATURES, generator=generator), torch.zeros(rows, dtype=torch.long)) for rows in sizes]


def prepared(*sizes: int) -> tuple[nn.Module, list, list, Calibration]:
    model, batches = nn.Sequential(softmax_model()).eval(), batches_of(*sizes)
    layers = find_layers(model)
    return model, batches, layers, calibrate(model, batches, layers, batch_loss, curvature=True)


@pytest.mark.parametrize("num_batches", [1, 2, 3])
def test_halves_are_those_of_the_data(num_batches):
    model, batches = softmax_model(), batches_of(*range(2, 2 + num_batches))
    drawn = drawn_batches(model, batches, seed=0)
    assert drawn.halves == [index % 2 for index in range(num_batches) for _ in range(DRAWS)]
    assert [len(targets) for _, targets in drawn.batches] == [len(x) for x, _ in batches for _ in range(DRAWS)]
    for index, (inputs, _) in enumerate(drawn.batches):
        assert torch.equal(inputs, batches[index // DRAWS][0])


def test_draws_follow_the_seed_and_the_batch():
    [batch] = batches_of(40)
    first, again, other = (drawn_batches(softmax_model(), [batch, batch], seed) for seed in (1, 1, 2))
    labels = [torch.stack([targets for _, targets in one.batches]) for one in (first, again, other)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])
    assert len({tuple(one.tolist()) for one in labels[0]}) == 2 * DRAWS  # though both batches are the same


def fisher_by_hand(model: nn.Module, batches: list) -> tuple[Tensor, Tensor, Tensor]:
    """Mean second moment of `p - onehot(y)` over y ~ p, its variance over one row's draw, and that of the inputs."""
    inputs = torch.cat([x for x, _ in batches]).double()
    probabilities = model.double()(inputs).softmax(-1).detach()
    model.float()
    gradients = probabilities[:, None] - torch.eye(CLASSES, dtype=torch.float64)  # row, label, class
    products = gradients[..., :, None] * gradients[..., None, :]
    of_rows = torch.einsum("nyij, ny -> nij", products, probabilities)
    closed = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
    torch.testing.assert_close(of_rows, closed)
    variances = torch.einsum("nyij, ny -> nij", products.square(), probabilities) - closed.square()
    return closed.mean(0), variances.mean(0), inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("half", [None, 0, 1], ids=["all", "even", "odd"])
def test_the_mean_over_draws_is_the_fisher_matrix(half):
    model, batches, layers, calibration = prepared(20, 16, 9)
    own = batches if half is None else batches[half::2]
    expected, variance, columns = fisher_by_hand(model, own)
    seeds, rows = 30, sum(len(x) for x, _ in own)

    def factors(one: Calibration):
        return one.layers["0"].curvature if half is None else one.layers["0"].halves[half]

    found = []
    for seed in range(seeds):
        one = factors(with_fisher(calibration, model, drawn_batches(model, batches, seed), layers))
        # scale R (x) C is a product, and C has a mean diagonal of one
        found.append(one.scale * one.rows.double() / columns.diagonal().mean())
        torch.testing.assert_close(one.columns.double(), columns / columns.diagonal().mean(), rtol=1e-4, atol=1e-5)
    standard_error = (variance / (seeds * DRAWS * rows)).sqrt()
    mean = torch.stack(found).mean(0)
    assert ((mean - expected).abs() < 4.5 * standard_error).all()
    of_data = factors(calibration)
    of_data = of_data.scale * of_data.rows.double() / columns.diagonal().mean()
    assert ((of_data - expected).abs() > 4.5 * standard_error).any()  # the labels of the data give another


def test_all_but_the_curvature_is_that_of_the_data():
    model, batches, layers, calibration = prepared(6, 5, 4)
    advanced = []
    drawn = drawn_batches(model, batches, seed=0)
    found = with_fisher(calibration, model, drawn, layers, lambda: advanced.append(1))
    assert len(advanced) == len(drawn.batches)
    before, after = calibration.layers["0"], found.layers["0"]
    assert after.curvature.scale != before.curvature.scale
    assert dataclasses.replace(after, curvature=before.curvature, halves=before.halves) == before
    assert dataclasses.replace(found, layers=calibration.layers) == calibration


def test_the_model_is_left_as_it_was():
    model, batches, layers, calibration = prepared(6, 5)
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with_fisher(calibration, model, drawn_batches(model, batches, seed=0), layers)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad
    assert (model[0].weight.grad == 7).all() and model[0].bias.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not model.training


def test_none_where_one_batch_cannot_be_drawn():
    good, bad = batches_of(3, 4)
    model = softmax_model()
    assert drawn_batches(model, [good, good], seed=0) is not None
    assert drawn_batches(model, [good, (bad[0], torch.zeros(4, CLASSES))], seed=0) is None
