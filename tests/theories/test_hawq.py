"""HAWQ's formula, and its traces against the dense Hessian."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import find_layers
from hf_lossless.theories import cet, hawq
from hf_lossless.theories.hawq import TraceSettings, estimate_traces, predict, predicted_loss_change
from hf_lossless.theories.problem import Problem

KEPT = SimpleNamespace(kind="kept", error=lambda matrix: torch.zeros_like(matrix))


def changed(error: Tensor) -> SimpleNamespace:
    """A candidate with this error."""
    return SimpleNamespace(kind="grid", error=lambda matrix: error)


def problem_of(candidates=None, seed: int = 0, loss=batch_loss, rows: int = 12, advance=lambda: None) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    layers = find_layers(model)
    batches = [(torch.randn(4, 5), torch.randint(0, 3, (4,))) for _ in range(rows // 4)]
    if candidates is None:
        candidates = {
            layer.name: [KEPT, *(changed(scale * torch.randn(layer.matrix.shape)) for scale in (0.01, 0.1))]
            for layer in layers
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


def exact_trace(problem: Problem, name: str) -> float:
    layer = next(layer for layer in problem.layers if layer.name == name)
    before = layer.weight.detach().clone()

    def mean_loss(weight: Tensor) -> Tensor:
        parameters = dict(problem.model.named_parameters()) | {f"{name}.weight": weight}
        losses = [
            nn.functional.cross_entropy(torch.func.functional_call(problem.model, parameters, inputs), targets)
            for inputs, targets in problem.batches
        ]
        return sum(losses) / len(losses)

    dense = torch.autograd.functional.hessian(mean_loss, before)
    return dense.reshape(before.numel(), before.numel()).trace().item()


def test_formula():
    assert predicted_loss_change(trace=3.0, num_weights=10, squared_error=4.0) == pytest.approx(0.5 * 3.0 / 10 * 4.0)


def test_traces_within_their_own_error():
    problem = problem_of()
    traces = estimate_traces(problem, TraceSettings(tolerance=0.1, max_probes=300))
    assert traces["2"].converged and traces["2"].num_probes < 300
    for name, estimate in traces.items():
        assert estimate.converged == (estimate.standard_error <= 0.1 * abs(estimate.trace))
        assert abs(estimate.trace - exact_trace(problem, name)) < 3 * estimate.standard_error


def test_predictions_are_the_formula():
    calls = []
    problem = problem_of(advance=lambda: calls.append(1))
    traces = estimate_traces(problem)
    predictions = predict(problem)
    assert len(calls) == sum(map(len, problem.candidates.values()))
    for layer in problem.layers:
        for candidate, prediction in zip(problem.candidates[layer.name], predictions[layer.name], strict=True):
            squared = candidate.error(layer.matrix).square().sum().item()
            expected = 0.5 * traces[layer.name].trace / layer.weight.numel() * squared
            assert prediction.loss_change == pytest.approx(expected, rel=1e-5)
        assert predictions[layer.name][0].loss_change == 0 < predictions[layer.name][1].loss_change


def test_the_seed_decides():
    first, second, third = (predict(problem_of(seed=seed))["0"][1] for seed in (0, 0, 1))
    assert first == second != third


def test_a_negative_trace_counts_as_zero(caplog):
    problem = problem_of(loss=lambda model, batch: -batch_loss(model, batch))
    with caplog.at_level(logging.INFO, logger="hf_lossless"):
        predictions = predict(problem)
    assert all(prediction.loss_change == 0 for group in predictions.values() for prediction in group)
    assert "2 negative" in caplog.text and "Hessian-vector products" in caplog.text


def test_a_zero_hessian(caplog):
    problem = problem_of(loss=lambda model, batch: model[2](torch.ones(1, 4)).sum())
    for name, group in predict(problem).items():
        assert [one.usable for one in group] == [one.kind == "kept" for one in problem.candidates[name]]
    assert "zero there, or underflows to zero: 0, 2. Calibrate" in caplog.text


def test_layers_that_can_only_be_kept_cost_nothing():
    problem = problem_of(candidates={"0": [KEPT], "2": [KEPT]}, loss=lambda model, batch: pytest.fail("not needed"))
    assert [prediction.loss_change for group in predict(problem).values() for prediction in group] == [0.0, 0.0]


def test_more_rows_asked_than_there_are():
    assert estimate_traces(problem_of(rows=4), TraceSettings(max_rows=10_000))


def test_an_error_that_is_not_finite_is_refused():
    problem = problem_of(candidates={"0": [changed(torch.full((4, 5), torch.inf))], "2": [KEPT]})
    assert not predict(problem)["0"][0].usable


@pytest.mark.parametrize("theory", [hawq, cet], ids=["hawq", "cet"])
def test_an_error_leaves_the_model_as_it_was(theory):
    def broken(matrix: Tensor) -> Tensor:
        raise RuntimeError("stop")

    problem = problem_of(candidates={"0": [SimpleNamespace(kind="grid", error=broken)], "2": [KEPT]})
    with pytest.raises(RuntimeError, match="stop"):
        theory.predict(problem)
    assert all(parameter.requires_grad for parameter in problem.model.parameters())
