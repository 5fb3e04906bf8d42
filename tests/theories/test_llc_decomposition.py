"""LLC's lossless decomposition against the lines of its Algorithm 2, written out slowly."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless import LosslessCompressionConfig
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.candidates.grids import Candidate
from hf_lossless.candidates.low_rank import factorise
from hf_lossless.candidates.propose import propose
from hf_lossless.candidates.ranks import ranks_by_layer
from hf_lossless.candidates.uniform import on_grid
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.plan import LowRank
from hf_lossless.theories import llc, llc_decomposition
from hf_lossless.theories.llc_decomposition import GAMMA, LOSS_THRESHOLD, points_down, predict_layer
from hf_lossless.theories.llc_decomposition import within_neighbourhood as within
from hf_lossless.theories.problem import Prediction, Problem


class Model(nn.Module):
    def __init__(self, rank: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.last = nn.Linear(20, 32), nn.Linear(32, 3)
        if rank is not None:
            left, right = torch.randn(32, rank), torch.randn(rank, 20)
            self.first.weight.data = left @ right / (rank * 20) ** 0.5
        self.first.weight.data *= scale

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(inputs)))


class Counted:
    """A loss that counts its passes over the two batches."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        return batch_loss(model, batch)

    @property
    def passes(self) -> float:
        return self.calls / 2


def prepared(model: nn.Module, bits=(2, 4, 8, 16), ranks="auto", **keywords) -> tuple[Problem, Counted]:
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    batches = [(torch.randn(rows, 20, generator=generator).to(dtype), torch.arange(rows) % 3) for rows in (9, 6)]
    model.eval()
    layers, loss = find_layers(model), Counted()
    calibration = calibrate(model, batches, layers, loss, gradients=True)
    config = LosslessCompressionConfig(ratio=2, bits=bits, ranks=ranks, group_size=None)
    candidates = propose(layers, calibration, config.choices, ranks_by_layer(layers, config.ranks), "plain")
    loss.calls = 0
    return Problem(model, batches, loss, layers, calibration, candidates, **keywords), loss


def factored(problem: Problem, position: int = 0) -> list[Candidate]:
    return [one for one in problem.candidates[problem.layers[position].name] if one.low_rank is not None]


def algorithm_2(problem: Problem, position: int, gamma: float) -> dict[int, float]:
    """Losses by index of the candidate, of those that the algorithm records; a search for each way of storing."""
    layer = problem.layers[position]
    candidates = factored(problem, position)
    gradient = problem.calibration.layers[layer.name].gradient
    W = layer.matrix.detach().clone()

    def f(matrix: Tensor) -> float:
        layer.weight.data = matrix
        with torch.no_grad():
            ids, targets = (torch.cat(parts) for parts in zip(*problem.batches, strict=True))
            loss = F.cross_entropy(problem.model(ids), targets).item()
        layer.weight.data = W
        return loss

    def way(one: Candidate) -> tuple:
        bits = (part and part.bits for part in (one.grid, one.low_rank.left, one.low_rank.right))
        return tuple(bits)

    clean, recorded = f(W), {}
    for storage in dict.fromkeys(map(way, candidates)):
        for index, one in enumerate(candidates):  # from the smallest rank up
            if way(one) != storage:
                continue
            base = torch.zeros_like(W) if one.grid is None else on_grid(W, one.grid)
            left, right = one.factors.left, one.factors.right
            stored = base + on_grid(left, one.low_rank.left) @ on_grid(right, one.low_rank.right)
            if math.sqrt(sum(x * x for x in (stored - W).flatten().tolist()) / W.numel()) > gamma:
                continue  # line 9
            slope = sum(p * d for p, d in zip(gradient.flatten(), (base + left @ right - W).flatten(), strict=True))
            if slope >= 0:
                continue  # line 10
            recorded[index] = abs(f(stored) - clean)  # line 11
            if recorded[index] <= 1e-4:
                break  # lines 12 to 14
    return recorded


@pytest.mark.parametrize("gamma", [GAMMA, 0.03, 0.06, 0.15])
@pytest.mark.parametrize("position", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_equals_the_slow_loop(gamma, position, scale):
    problem, _ = prepared(Model(scale=scale))
    layer, candidates = problem.layers[position], factored(problem, position)
    found = [one.loss_change for one in predict_layer(problem, layer, candidates, gamma)]
    recorded = algorithm_2(problem, position, gamma)
    assert len(found) == len(candidates)
    assert {index for index, change in enumerate(found) if change < math.inf} == set(recorded)
    for index, change in recorded.items():
        assert found[index] == pytest.approx(change, abs=1e-6)


def test_the_slow_loop_sees_every_line():
    """Else the comparison above would prove little."""
    problem, _ = prepared(Model())
    kinds = set()
    for position in (0, 1):
        candidates, recorded = factored(problem, position), algorithm_2(problem, position, 0.15)
        assert 0 < len(recorded) <= len(candidates) and max(recorded.values()) > 1e-3
        kinds |= {candidates[index].kind for index in recorded}
    assert kinds == {"low_rank", "sum"}
    assert len(algorithm_2(problem, 0, GAMMA)) < len(algorithm_2(problem, 0, 0.06)) < len(factored(problem))
    small, _ = prepared(Model(scale=0.05))
    assert min(algorithm_2(small, 0, 0.15).values()) <= 1e-4


def test_within_neighbourhood():
    """A root mean square, that of single weights: the size of the matrix does not matter."""
    assert GAMMA == 8e-3
    for shape in ((1, 1), (30, 50)):
        assert within(torch.full(shape, GAMMA * 0.9999)) and not within(torch.full(shape, GAMMA * 1.0001))
    single = torch.zeros(10, 10)
    single[3, 4] = 10 * 0.0079
    assert within(single) and not within(single, 0.0078)


def test_points_down():
    matrix, gradient = torch.ones(2, 2), torch.tensor([[1.0, -2.0], [0.0, 0.5]])
    assert points_down(-gradient, gradient, matrix) and not points_down(gradient, gradient, matrix)
    across = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert not points_down(across, gradient, matrix)  # < 0 is asked
    assert points_down(1e-7 * gradient, gradient, matrix)  # rounding
    assert not points_down(1e-5 * gradient, gradient, matrix)
    assert points_down(torch.zeros(2, 2), gradient, torch.zeros(2, 2))
    assert points_down(1e-3 * gradient, gradient, matrix.bfloat16())
    assert not points_down(0.1 * gradient, gradient, matrix.bfloat16())


def test_the_sign_is_that_of_the_rank_alone():
    """A grid of the factors turns the sign of an error at random; line 10 does not see it."""
    problem, _ = prepared(Model(), bits=(4, 16), ranks={"first": (8,)})
    layer = problem.layers[0]
    packed, floating = (one for one in factored(problem) if one.kind == "low_rank")
    assert packed.low_rank.left is not None and floating.low_rank.left is None
    for sign in (1, -1):
        gradient = sign * floating.error(layer.matrix)
        statistics = replace(problem.calibration.layers["first"], gradient=gradient)
        layers = problem.calibration.layers | {"first": statistics}
        asked = replace(problem, calibration=replace(problem.calibration, layers=layers))
        found = predict_layer(asked, layer, [packed, floating], gamma=1.0)
        assert [one.usable for one in found] == [sign < 0] * 2


def test_one_pass_for_each_that_is_measured_and_none_after_the_stop(monkeypatch):
    problem, loss = prepared(Model(rank=3), bits=(16,))
    layer = problem.layers[0]
    full = factorise(layer.matrix)
    ladder = [
        Candidate(None, 1, low_rank=LowRank(rank=rank, shape=(32, 20)), factors=full.truncated(rank))
        for rank in range(1, 9)
    ]
    found = [one.loss_change for one in predict_layer(problem, layer, ladder, gamma=1.0)]
    # Ranks 1 and 2 are measured or refused; rank 3 is exact and ends the search.
    assert found[2] <= 1e-6 and found[3:] == [math.inf] * 5
    assert loss.passes == sum(math.isfinite(change) for change in found) <= 3

    monkeypatch.setattr(llc_decomposition, "LOSS_THRESHOLD", -1.0)
    loss.calls = 0
    found = [one.loss_change for one in predict_layer(problem, layer, ladder, gamma=1.0)]
    assert all(change <= 1e-6 for change in found[2:])  # it never stops
    assert loss.passes == sum(math.isfinite(change) for change in found) >= 6
    assert LOSS_THRESHOLD == 1e-4


def test_each_way_of_storing_is_a_search_of_its_own():
    problem, _ = prepared(Model(rank=3), bits=(8, 16), ranks={"first": (3,)})
    found = predict_layer(problem, problem.layers[0], factored(problem))
    stored = [one.low_rank.left and one.low_rank.left.bits for one in factored(problem)]
    assert stored == [8, None] and all(one.usable for one in found)


def test_every_candidate_is_counted_for_the_progress_bar():
    calls = []
    problem, _ = prepared(Model(), advance=lambda: calls.append(1))
    predict_layer(problem, problem.layers[0], factored(problem))
    assert len(calls) == len(factored(problem))


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("sign", [1, -1], ids=["up", "down"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_exact_rank_passes(rank, sign, dtype):
    """Whichever way the error of rounding happens to point."""
    model = Model(rank=rank).to(dtype)
    left, right = torch.randn(32, rank, dtype=torch.float64), torch.randn(rank, 20, dtype=torch.float64)
    model.first.weight.data = (left @ right / (rank * 20) ** 0.5).to(dtype)
    problem, _ = prepared(model, bits=(16,))
    layer = problem.layers[0]
    exact = next(one for one in factored(problem) if one.low_rank.rank == rank)
    assert max(one.low_rank.rank for one in factored(problem)) == rank
    gradient = sign * exact.error(layer.matrix)
    statistics = replace(problem.calibration.layers["first"], gradient=gradient)
    asked = replace(problem, calibration=replace(problem.calibration, layers={"first": statistics}))
    (found,) = predict_layer(asked, layer, [exact])
    assert found.loss_change <= (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_llc_puts_both_algorithms_in_the_order_of_the_candidates():
    problem, _ = prepared(Model(rank=3))
    layer = problem.layers[0]
    group = problem.candidates["first"]
    mixed = [*group[-3:], *group[:-3]]  # sums first
    asked = replace(problem, candidates=problem.candidates | {"first": mixed})
    found = llc.predict(asked)["first"]
    factors = [one for one in mixed if one.low_rank is not None]
    widths = [one for one in mixed if one.low_rank is None]
    only_widths = llc.predict(replace(problem, candidates=problem.candidates | {"first": widths}))["first"]
    assert [one for one, candidate in zip(found, mixed, strict=True) if candidate.low_rank is None] == only_widths
    assert [one for one, candidate in zip(found, mixed, strict=True) if candidate.low_rank] == predict_layer(
        problem, layer, factors
    )


def test_a_loss_that_overflows_is_refused():
    problem, _ = prepared(Model(rank=3), bits=(16,), ranks={"first": (3,)})

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch_loss(model, batch) * torch.nan

    found = predict_layer(replace(problem, loss=loss), problem.layers[0], factored(problem))
    assert len(found) == 1 and not found[0].usable and isinstance(found[0], Prediction)
