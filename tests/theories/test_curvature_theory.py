"""The curvature theory against its formula, and against the loss itself where that is quadratic."""

import pytest
import torch
from torch import nn

from hf_lossless.calibration.curvature import second_order_change
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.candidates.propose import propose
from hf_lossless.candidates.ranks import ranks_by_layer
from hf_lossless.candidates.round_packed import round_with_feedback
from hf_lossless.config import LosslessCompressionConfig
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.grid import dequantise
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.plan import LayerPlan
from hf_lossless.theories.curvature import predict
from hf_lossless.theories.fitted_rounding import feedback_changes
from hf_lossless.theories.problem import Problem
from hf_lossless.theories.rank_changes import RankChanges, rounding_change


def prepared(ranks="auto"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 4)).eval()
    batches = [(torch.randn(16, 24), torch.arange(16) % 4) for _ in range(4)]
    layers = find_layers(model)
    calibration = calibrate(model, batches, layers, batch_loss, curvature=True)
    config = LosslessCompressionConfig(ratio=2, ranks=ranks, theory="curvature", bits=(2, 4, 8, 16), group_size=8)
    candidates = propose(layers, calibration, config.choices, ranks_by_layer(layers, config.ranks), "metric")
    calls = []
    problem = Problem(model, batches, batch_loss, layers, calibration, candidates, advance=lambda: calls.append(1))
    return problem, calls


def test_every_candidate_by_its_formula():
    problem, calls = prepared()
    predictions = predict(problem)
    by_feedback = feedback_changes(problem)  # see test_fitted_rounding.py
    kinds = set()
    for layer in problem.layers:
        statistics = problem.calibration.layers[layer.name]
        for candidate, prediction in zip(problem.candidates[layer.name], predictions[layer.name], strict=True):
            kinds.add((candidate.kind, candidate.kind == "grid" and candidate.grid.rounding))
            if candidate.kind == "kept":
                expected = 0.0
            elif candidate.kind == "grid" and candidate.grid.rounding == "feedback":
                expected = by_feedback[layer.name][candidate.grid]
            elif candidate.kind == "grid":
                expected = second_order_change(candidate.error(layer.matrix), statistics.curvature)
            else:
                left = layer.matrix.detach()
                if candidate.grid is not None:  # the factors stand for what the grid leaves
                    error = problem.candidates[layer.name][
                        [one.grid for one in problem.candidates[layer.name]].index(candidate.grid)
                    ].error(layer.matrix)
                    left = -error
                rank = candidate.low_rank.rank
                expected = RankChanges(statistics).changes(left, rank)[rank].item()
                expected += rounding_change(candidate.factors, candidate.low_rank, statistics.curvature)
            assert prediction.loss_change == pytest.approx(expected, rel=1e-4, abs=1e-9)
            assert prediction.loss_change >= 0 and prediction.regime is None
    assert kinds == {
        ("kept", False),
        ("grid", "nearest"),
        ("grid", "feedback"),
        ("low_rank", False),
        ("sum", False),
    }
    assert len(calls) == sum(map(len, problem.candidates.values()))


def test_more_bits_and_more_rank_are_predicted_to_be_no_worse():
    problem, _ = prepared()
    for name, group in predict(problem).items():
        candidates = problem.candidates[name]
        for rounding in ("nearest", "feedback"):
            widths = [
                one.loss_change
                for one, which in zip(group, candidates, strict=True)
                if which.low_rank is None and (which.grid is None or which.grid.rounding == rounding)
            ]
            kept = widths.pop(3 if rounding == "nearest" else 0)  # the kept layer stands behind the first grids
            assert kept == 0 and len(widths) == 3 and widths == sorted(widths, reverse=True)
        exact = [
            one.loss_change
            for one, which in zip(group, candidates, strict=True)
            if which.kind == "low_rank" and which.low_rank.left is None
        ]
        assert exact == sorted(exact, reverse=True)


def test_the_loss_of_other_rows_rises_as_predicted():
    """Least squares through the softmax's own gradient noise would not do: a Fisher that is the Hessian, at the truth.

    Labels drawn from the model itself make the empirical Fisher the Hessian in the mean.
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 3)).eval()
    with torch.no_grad():
        model[0].weight.mul_(3)

    def rows(number: int):
        inputs = torch.randn(number, 12)
        with torch.no_grad():
            labels = torch.distributions.Categorical(logits=model(inputs)).sample()
        return [(inputs[part], labels[part]) for part in torch.arange(number).split(64)]

    layers = find_layers(model)
    calibration = calibrate(model, rows(2048), layers, batch_loss, curvature=True)
    config = LosslessCompressionConfig(ratio=2, theory="curvature", bits=(2, 3), group_size=None)
    candidates = propose(layers, calibration, config.choices, {}, "metric")
    problem = Problem(model, [], batch_loss, layers, calibration, candidates)
    others = rows(60_000)
    before = sum(batch_loss(model, batch).item() * len(batch[1]) for batch in others) / 60_000
    weight = model[0].weight.data.clone()
    for candidate, prediction in zip(candidates["0"], predict(problem)["0"], strict=True):
        plan = LayerPlan(kind="grid", grid=candidate.grid, cost_bytes=1, predicted_loss_change=0.0)
        fed_back = round_with_feedback(layers, {"0": plan}, calibration).get("0")  # codes by feedback
        if fed_back is None:
            model[0].weight.data = weight + candidate.error(weight)
        else:
            model[0].weight.data = dequantise(fed_back.codes, fed_back.scales, fed_back.zeros, fed_back.grid)
        after = sum(batch_loss(model, batch).item() * len(batch[1]) for batch in others) / 60_000
        assert after - before == pytest.approx(prediction.loss_change, rel=0.35)
        model[0].weight.data = weight
