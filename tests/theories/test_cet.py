"""CET's quadratic form against the dense Hessian."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_lossless.calibration.hessian import hessian
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import find_layers
from hf_lossless.theories.cet import (
    CurvatureSettings,
    canonical,
    curvature_of,
    examine,
    predict,
    predicted_loss_change,
    quadratic_change,
)
from hf_lossless.theories.problem import Problem


@pytest.fixture(autouse=True)
def _no_noise_limit(monkeypatch):
    """The formula, whatever the size of the noise; see test_noise_limits for the refusals."""
    monkeypatch.setattr("hf_lossless.theories.noise_limits.SECOND_ORDER", float("inf"))


KEPT = SimpleNamespace(kind="kept", error=lambda matrix: torch.zeros_like(matrix))
EVERYTHING = CurvatureSettings(num_eigenpairs=100, max_iterations=100, trace_probes=4)
LAYERS = ["embedding", "body", "head"]


def changed(error: Tensor) -> SimpleNamespace:
    """A candidate with this error."""
    return SimpleNamespace(kind="grid", error=lambda matrix: error)


class Model(nn.Module):
    """Small enough for a dense Hessian; two of the embedding's rows never occur."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.head = nn.Embedding(8, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids).mean(1))))


def problem_of(loss=batch_loss, dtype=torch.float64, candidates=None, seed: int = 0, advance=lambda: None) -> Problem:
    model = Model().to(dtype).eval()
    layers = find_layers(model)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, 6, (8, 3), generator=generator), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(3)
    ]
    if candidates is None:
        candidates = {
            layer.name: [changed(torch.randn(layer.matrix.shape, generator=generator)), KEPT] for layer in layers
        }
    return Problem(
        model=model,
        batches=batches,
        loss=loss,
        layers=layers,
        calibration=None,
        candidates=candidates,
        seed=seed,
        advance=advance,
    )


def dense(problem: Problem, name: str) -> Tensor:
    """The Hessian [n, n] of one layer."""
    weight = problem.model.get_submodule(name).weight.detach().clone()

    def mean_loss(weight: Tensor) -> Tensor:
        parameters = dict(problem.model.named_parameters()) | {f"{name}.weight": weight}

        def called(ids: Tensor) -> Tensor:
            return torch.func.functional_call(problem.model, parameters, ids)

        return sum(problem.loss(called, batch) for batch in problem.batches) / len(problem.batches)

    return torch.autograd.functional.hessian(mean_loss, weight).reshape(weight.numel(), weight.numel())


def curvature(problem: Problem, name: str, settings: CurvatureSettings):
    layer = next(layer for layer in problem.layers if layer.name == name)
    with hessian(problem.model, problem.batches, problem.layers, problem.loss) as product:
        return curvature_of(product, layer, settings), product.num_products


def minus(model: nn.Module, batch) -> Tensor:
    """A loss whose Hessian has large negative eigenvalues."""
    return -batch_loss(model, batch)


def squared(model, batch) -> Tensor:
    """A loss with a positive definite Hessian in the head, and in nothing else."""
    return model(batch[0]).square().mean() + 0.0 * batch[1].sum()


@pytest.mark.parametrize("loss", [batch_loss, minus, squared], ids=["cross-entropy", "negated", "squared"])
@pytest.mark.parametrize("name", LAYERS)
def test_leading_eigenvalues_within_one_percent(loss, name):
    problem = problem_of(loss)
    # The head's Hessian under `squared` has every eigenvalue three times, once for each output.
    settings = CurvatureSettings(num_eigenpairs=4, max_iterations=20, starts=3, tolerance=1e-3)
    found, num_products = curvature(problem, name, settings)
    exact = torch.linalg.eigvalsh(dense(problem, name))
    exact = exact[exact.abs().argsort(descending=True)][:4]
    torch.testing.assert_close(found.eigenpairs.values, exact, rtol=0.01, atol=1e-6)
    assert found.num_products == num_products <= 1 + 20 + 8
    assert (exact.min() < -1e-6) == (found.eigenpairs.values.min() < -1e-6)


@pytest.mark.parametrize("loss", [batch_loss, minus], ids=["cross-entropy", "negated"])
@pytest.mark.parametrize("name", LAYERS)
def test_all_eigenpairs_give_the_quadratic_form_exactly(loss, name):
    problem = problem_of(loss)
    found, _ = curvature(problem, name, EVERYTHING)
    exact = dense(problem, name)
    for seed in range(3):
        error = torch.randn(
            problem.model.get_submodule(name).weight.shape,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        expected = 0.5 * error.flatten() @ exact @ error.flatten()
        assert predicted_loss_change(found, error) == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)


def test_tokens_that_do_not_occur_are_left_out():
    found, _ = curvature(problem_of(), "embedding", EVERYTHING)
    assert found.support.tolist() == list(range(6 * 4)) and found.num_weights == 32
    error = torch.zeros(8, 4, dtype=torch.float64)
    error[6:] = 5.0
    assert predicted_loss_change(found, error) == 0


def test_few_eigenpairs_are_right_on_average():
    """Over random errors the mean of 1/2 d'Hd is 1/2 trace; the rest's mean curvature stands for what was not found."""
    problem = problem_of(squared)
    settings = CurvatureSettings(num_eigenpairs=2, max_iterations=12, trace_probes=400)
    found, _ = curvature(problem, "body", settings)
    exact = dense(problem, "body")
    left = (exact.trace() - found.eigenpairs.values.sum()) / (24 - 2)
    assert abs(found.rest - left.item()) < 3 * found.rest_error
    expected = 0.5 * exact.trace().item()
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(2000, 6, 4, generator=generator, dtype=torch.float64)
    mean = sum(predicted_loss_change(found, error) for error in errors) / 2000
    assert mean == pytest.approx(expected, rel=0.1)


def test_the_rest_is_never_a_gain():
    found, _ = curvature(problem_of(minus), "head", CurvatureSettings(num_eigenpairs=1, max_iterations=4))
    assert found.rest == 0.0
    flat, _ = curvature(problem_of(), "head", CurvatureSettings(num_eigenpairs=1, trace_probes=0))
    assert flat.rest == 0.0 == flat.rest_error


def test_descent_lowers_the_prediction():
    """Along the eigenvector of a negative eigenvalue."""
    found, _ = curvature(problem_of(minus), "head", EVERYTHING)
    lowest = found.eigenpairs.values.argmin()
    error = found.eigenpairs.vectors[:, lowest].view(3, 6)
    assert predicted_loss_change(found, error) == pytest.approx(found.eigenpairs.values[lowest].item() / 2)


def test_canonical_transformation():
    vectors, _ = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    error = 3 * vectors[:, 0] - 2 * vectors[:, 1]
    torch.testing.assert_close(canonical(vectors, error).tolist(), [3.0, -2.0], rtol=1e-5, atol=0)


def test_rounding_never_makes_the_rest_negative():
    coordinates = torch.tensor([1.0])
    assert quadratic_change(torch.tensor([2.0]), coordinates, squared_error=1 - 1e-7, rest=10.0) == 1.0


def test_predictions():
    calls = []
    problem = problem_of(advance=lambda: calls.append(1))
    predictions, spectra = examine(problem, EVERYTHING)
    assert len(calls) == 6
    for layer in problem.layers:
        change, kept = predictions[layer.name]
        error = problem.candidates[layer.name][0].error(layer.matrix).double().flatten()
        expected = 0.5 * error @ dense(problem, layer.name) @ error
        assert change.loss_change == pytest.approx(expected.item(), rel=1e-5)
        assert kept.loss_change == 0
        spectrum = spectra[layer.name]
        assert spectrum.converged and spectrum.num_weights == layer.weight.numel()
        assert len(spectrum.values) == len(spectrum.residuals) <= spectrum.num_products


@pytest.mark.parametrize(
    ("loss", "definite"), [(squared, True), (minus, False)], ids=["ellipsoid", "hyperbolic-paraboloid"]
)
def test_the_shape_is_reported(loss, definite):
    _, spectra = examine(problem_of(loss), EVERYTHING)
    assert spectra["head"].definite == definite


def test_the_default_settings(caplog):
    with caplog.at_level(logging.INFO, logger="hf_lossless"):
        first, second, third = (predict(problem_of(dtype=torch.float32, seed=seed)) for seed in (0, 0, 1))
    assert first == second != third
    assert "Hessian-vector products" in caplog.text


def test_a_report_without_convergence(caplog):
    settings = CurvatureSettings(num_eigenpairs=3, max_iterations=3, tolerance=1e-9)
    with caplog.at_level(logging.INFO, logger="hf_lossless"):
        _, spectra = examine(problem_of(), settings)
    assert not spectra["body"].converged and "Raise max_iterations" in spectra["body"].status
    assert "of 3 layers' eigenpairs not within 1e-09;" in caplog.text


def test_a_zero_hessian(caplog):
    problem = problem_of(loss=lambda model, batch: model.head(torch.ones(1, 6, dtype=torch.float64)).sum())
    predictions, spectra = examine(problem)
    assert [[one.usable for one in group] for group in predictions.values()] == [
        [candidate.kind == "kept" for candidate in problem.candidates[name]] for name in predictions
    ]
    assert all(spectrum.values == () and spectrum.converged for spectrum in spectra.values())
    assert f"zero there, or underflows to zero: {', '.join(LAYERS)}. Calibrate" in caplog.text


def test_layers_that_can_only_be_kept_cost_nothing():
    problem = problem_of(
        candidates={name: [KEPT] for name in LAYERS}, loss=lambda model, batch: pytest.fail("not needed")
    )
    assert [prediction.loss_change for group in predict(problem).values() for prediction in group] == [0.0] * 3


def test_an_error_that_is_not_finite_is_refused():
    candidates = {name: [KEPT] for name in LAYERS} | {"head": [changed(torch.full((3, 6), torch.inf)), KEPT]}
    assert [prediction.usable for prediction in predict(problem_of(candidates=candidates))["head"]] == [False, True]


def test_the_model_is_left_as_it_was():
    problem = problem_of()
    before = {name: parameter.detach().clone() for name, parameter in problem.model.named_parameters()}
    predict(problem)
    for name, parameter in problem.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and parameter.requires_grad
