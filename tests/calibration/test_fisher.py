"""The Fisher matrix of a model's own predictions: itself for few classes, by drawn labels for many."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from hf_lossless.calibration.fisher import fisher_batches, fisher_roots, with_fisher
from hf_lossless.calibration.model_labels import DRAWS
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import find_layers

FEATURES, FEW, MANY = 4, 3, 7


def softmax_model(classes: int = MANY) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, classes).eval()


def batches_of(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """All of one class, so that the data's labels are not what the model predicts."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, FEATURES, generator=generator), torch.zeros(rows, dtype=torch.long)) for rows in sizes]


def prepared(*sizes: int, classes: int = MANY) -> tuple[nn.Module, list, list, Calibration]:
    model, batches = nn.Sequential(softmax_model(classes)).eval(), batches_of(*sizes)
    layers = find_layers(model)
    return model, batches, layers, calibrate(model, batches, layers, batch_loss, curvature=True)


@pytest.mark.parametrize("num_batches", [1, 2, 3])
def test_halves_are_those_of_the_data(num_batches):
    model, batches = softmax_model(), batches_of(*range(2, 2 + num_batches))
    drawn = fisher_batches(model, batches, seed=0)
    assert drawn.halves == [index % 2 for index in range(num_batches) for _ in range(DRAWS)]
    assert [len(targets) for _, targets in drawn.batches] == [len(x) for x, _ in batches for _ in range(DRAWS)]
    for index, (inputs, _) in enumerate(drawn.batches):
        assert torch.equal(inputs, batches[index // DRAWS][0])


def test_draws_follow_the_seed_and_the_batch():
    [batch] = batches_of(40)
    first, again, other = (fisher_batches(softmax_model(), [batch, batch], seed) for seed in (1, 1, 2))
    labels = [torch.stack([targets for _, targets in one.batches]) for one in (first, again, other)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])
    assert len({tuple(one.tolist()) for one in labels[0]}) == 2 * DRAWS  # though both batches are the same


def fisher_by_hand(model: nn.Module, batches: list) -> tuple[Tensor, Tensor, Tensor]:
    """Mean second moment of `p - onehot(y)` over y ~ p, its variance over one row's draw, and that of the inputs."""
    inputs = torch.cat([x for x, _ in batches]).double()
    probabilities = model.double()(inputs).softmax(-1).detach()
    model.float()
    gradients = probabilities[:, None] - torch.eye(probabilities.shape[1], dtype=torch.float64)  # row, label, class
    products = gradients[..., :, None] * gradients[..., None, :]
    of_rows = torch.einsum("nyij, ny -> nij", products, probabilities)
    closed = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
    torch.testing.assert_close(of_rows, closed)
    variances = torch.einsum("nyij, ny -> nij", products.square(), probabilities) - closed.square()
    return closed.mean(0), variances.mean(0), inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("classes", [2, 3, 5, 40])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0], ids=["even", "usual", "certain"])
def test_roots_are_those_of_the_fisher_matrix(classes: int, sharpness: float):
    probabilities = (sharpness * torch.randn(9, classes, generator=torch.Generator().manual_seed(0)).double()).softmax(
        1
    )
    roots = fisher_roots(probabilities)
    assert roots.shape == (9, classes, classes - 1) and roots.isfinite().all()
    expected = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
    torch.testing.assert_close(roots @ roots.mT, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("classes", [2, FEW, 5])
@pytest.mark.parametrize("half", [None, 0, 1], ids=["all", "even", "odd"])
def test_of_few_classes_it_is_the_fisher_matrix_itself(half: int | None, classes: int):
    model, batches, layers, calibration = prepared(20, 16, 9, classes=classes)
    expected, _, columns = fisher_by_hand(model, batches if half is None else batches[half::2])
    made = fisher_batches(model, batches, seed=0)
    assert made.is_exact and len(made.batches) == (classes - 1) * len(batches)
    [statistics] = with_fisher(calibration, model, made, layers).layers.values()
    one = statistics.curvature if half is None else statistics.halves[half]
    found = one.scale * one.rows.double() / columns.diagonal().mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(one.columns.double(), columns / columns.diagonal().mean(), rtol=1e-4, atol=1e-5)


def test_rows_of_which_some_are_left_out_are_drawn():
    model, [batch] = softmax_model(FEW), batches_of(8)
    assert fisher_batches(model, [batch], seed=0).is_exact
    labels = batch[1].clone()
    labels[3] = -100
    assert not fisher_batches(model, [batch, (batch[0], labels)], seed=0).is_exact


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
        one = factors(with_fisher(calibration, model, fisher_batches(model, batches, seed), layers))
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
    drawn = fisher_batches(model, batches, seed=0)
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
    with_fisher(calibration, model, fisher_batches(model, batches, seed=0), layers)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad
    assert (model[0].weight.grad == 7).all() and model[0].bias.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not model.training


def test_none_where_one_batch_cannot_be_drawn():
    good, bad = batches_of(3, 4)
    model = softmax_model()
    assert fisher_batches(model, [good, good], seed=0) is not None
    assert fisher_batches(model, [good, (bad[0], torch.zeros(4, MANY))], seed=0) is None
