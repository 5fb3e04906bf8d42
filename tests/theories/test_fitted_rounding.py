"""Predictions for rounding by feedback, against every row rounded and judged."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from hf_lossless.calibration.curvature import KroneckerFactors, second_order_change
from hf_lossless.calibration.statistics import Calibration, LayerStatistics, Moments, calibrate
from hf_lossless.candidates.damping import FEEDBACK, FEEDBACK_OF_EMBEDDINGS
from hf_lossless.candidates.feedback import quantise_in_metric
from hf_lossless.candidates.grids import Candidate
from hf_lossless.candidates.round_packed import round_with_feedback
from hf_lossless.candidates.uniform import quantise
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.grid import dequantise
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.plan import Grid, LayerPlan
from hf_lossless.theories import fitted_rounding
from hf_lossless.theories.fitted_rounding import SAMPLED_ROWS, feedback_changes
from hf_lossless.theories.problem import Problem

WIDTHS = (2, 3, 4)


def moments(columns: int, seed: int, rows: int | None = None, diagonal: bool = False) -> Tensor:
    """Second moments of rows that depend on each other, with a mean diagonal of one."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows or 3 * columns, columns, generator=generator)
    inputs = inputs + 2 * inputs[:, :1] * torch.linspace(-1, 1, columns)
    moment = inputs.T @ inputs
    moment = moment / moment.diagonal().mean()
    return moment.diagonal().clone() if diagonal else moment


def statistics_of(
    rows: Tensor, columns: int, *, halves: bool = True, diagonal: bool = False, scales: tuple = (0.3, 0.2)
) -> LayerStatistics:
    """R in all, C of either half, and their mean."""
    even, odd = (
        KroneckerFactors(rows, moments(columns, seed, diagonal=diagonal), scale) for seed, scale in enumerate(scales)
    )
    whole = KroneckerFactors(rows, (even.columns + odd.columns) / 2, sum(scales) / 2)
    return LayerStatistics(1, None, Moments(0.0, 1.0, 1), curvature=whole, halves=(even, odd) if halves else None)


def problem_of(modules: dict[str, nn.Module], statistics: dict[str, LayerStatistics], **settings) -> Problem:
    """Every width of every layer, to nearest and by feedback."""
    model = nn.ModuleDict(modules)
    layers = find_layers(model)
    candidates = {}
    for layer in layers:
        grids = [
            quantise(layer.matrix, Grid(bits=bits, **{"group_size": 8, "rounding": "feedback", **settings})).grid
            for bits in WIDTHS
        ]
        nearest = [grid.model_copy(update={"rounding": "nearest"}) for grid in grids]
        candidates[layer.name] = [Candidate(None, 9), *(Candidate(grid, 1) for grid in nearest + grids)]
    return Problem(model, [], batch_loss, layers, Calibration(statistics, 1.0, 8), candidates)


def row_shares(size: int, spread: float = 1.0) -> Tensor:
    """A diagonal R with a mean of one."""
    rows = torch.rand(size, generator=torch.Generator().manual_seed(size)).square() * spread + 0.05
    return rows / rows.mean()


def error_of(layer: Layer, grid: Grid, fit: KroneckerFactors, damping: float) -> Tensor:
    matrix = layer.matrix.detach()
    [[one]] = quantise_in_metric(matrix[None], [[grid]], fit.columns[None], damping, fitted_rounding._ROUNDS)
    return dequantise(one.codes, one.scales, one.zeros, one.grid) - matrix


def crossed(layer: Layer, grid: Grid, statistics: LayerStatistics, damping: float = FEEDBACK) -> float:
    """The mean over both ways round of the whole layer's cost, fitted to one half and judged by the other."""
    even, odd = statistics.halves
    changes = [
        second_order_change(error_of(layer, grid, fit, damping), judge) for fit, judge in ((even, odd), (odd, even))
    ]
    return sum(changes) / 2


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
@pytest.mark.parametrize("rows", [1, 10, SAMPLED_ROWS], ids="{}rows".format)
def test_of_a_small_layer_it_is_the_cross_fitted_cost(rows, diagonal, symmetric):
    torch.manual_seed(0)
    statistics = statistics_of(row_shares(rows), 20, diagonal=diagonal)
    problem = problem_of({"one": nn.Linear(20, rows)}, {"one": statistics}, symmetric=symmetric)
    found = feedback_changes(problem)["one"]
    assert [grid.bits for grid in found] == list(WIDTHS) and {grid.rounding for grid in found} == {"feedback"}
    for grid, change in found.items():
        assert change == pytest.approx(crossed(problem.layers[0], grid, statistics), rel=1e-3)
    assert sorted(found.values(), reverse=True) == list(found.values())


def test_without_halves_it_is_judged_by_what_it_is_fitted_to():
    torch.manual_seed(0)
    statistics = statistics_of(row_shares(12), 20, halves=False)
    problem = problem_of({"one": nn.Linear(20, 12)}, {"one": statistics})
    fed_back = []
    for grid, change in feedback_changes(problem)["one"].items():
        plan = LayerPlan(kind="grid", grid=grid, cost_bytes=1, predicted_loss_change=0.0)
        one = round_with_feedback(problem.layers, {"one": plan}, problem.calibration)["one"]
        error = dequantise(one.codes, one.scales, one.zeros, one.grid) - problem.layers[0].matrix.detach()
        fed_back.append(second_order_change(error, statistics.curvature))
        assert 0.999 * fed_back[-1] <= change <= 1.1 * fed_back[-1]  # one round of descent instead of two
    halved = problem_of({"one": problem.layers[0].module}, {"one": statistics_of(row_shares(12), 20)})
    assert all(more > less for more, less in zip(feedback_changes(halved)["one"].values(), fed_back, strict=True))


@pytest.mark.parametrize("spread", [0.0, 50.0], ids=["even", "uneven"])
def test_of_a_large_layer_a_sample_of_rows_is_near(spread):
    torch.manual_seed(0)
    statistics = statistics_of(row_shares(600, spread), 24)
    problem = problem_of({"one": nn.Linear(24, 600)}, {"one": statistics})
    found = feedback_changes(problem)["one"]
    for grid, change in found.items():
        expected = crossed(problem.layers[0], grid, statistics)
        assert change == pytest.approx(expected, rel=0.15)
        assert change != pytest.approx(expected, rel=1e-6)  # it is a sample
    assert feedback_changes(problem) == {"one": found}  # the same one
    others = feedback_changes(dataclasses.replace(problem, seed=1))["one"]
    assert others != found and others == pytest.approx(found, rel=0.3)


def test_the_mean_over_samples_is_the_whole():
    torch.manual_seed(0)
    statistics = statistics_of(row_shares(200, 10.0), 12)
    problem = problem_of({"one": nn.Linear(12, 200)}, {"one": statistics})
    samples = [feedback_changes(dataclasses.replace(problem, seed=seed))["one"] for seed in range(25)]
    for grid in samples[0]:
        mean = sum(one[grid] for one in samples) / len(samples)
        assert mean == pytest.approx(crossed(problem.layers[0], grid, statistics), rel=0.03)


def test_of_a_small_layer_rows_that_go_together_count_as_such():
    torch.manual_seed(0)
    statistics = statistics_of(moments(30, 5), 20)
    problem = problem_of({"one": nn.Linear(20, 30)}, {"one": statistics})
    for grid, change in feedback_changes(problem)["one"].items():
        assert change == pytest.approx(crossed(problem.layers[0], grid, statistics), rel=1e-3)


@pytest.mark.parametrize("largest_batch", [1, 2**25], ids=["one-by-one", "together"])
def test_layers_do_not_see_each_other(largest_batch, monkeypatch):
    monkeypatch.setattr(fitted_rounding, "_LARGEST_BATCH", largest_batch)
    torch.manual_seed(0)
    modules = {
        "first": nn.Linear(16, 10),
        "second": nn.Linear(16, 10),
        "conv": nn.Conv2d(4, 10, 2),
        "embedding": nn.Embedding(10, 16),
        "other": nn.Linear(5, 7),
        "long": nn.Linear(16, 10),
    }
    statistics = {
        name: statistics_of(
            row_shares(module.weight.shape[0]), module.weight[0].numel(), diagonal=name == "long", scales=(0.1, 0.4)
        )
        for name, module in modules.items()
    }
    together = feedback_changes(problem_of(modules, statistics))
    assert together.keys() == modules.keys()
    for name, module in modules.items():
        problem = problem_of({name: module}, {name: statistics[name]})
        damping = FEEDBACK_OF_EMBEDDINGS if name == "embedding" else FEEDBACK
        for grid, change in feedback_changes(problem)[name].items():
            assert together[name][grid] == pytest.approx(change, rel=1e-2)
            assert change == pytest.approx(crossed(problem.layers[0], grid, statistics[name], damping), rel=1e-3)


@pytest.mark.parametrize("rows", [9, 100], ids="{}rows".format)
def test_where_the_loss_does_not_reach_it_costs_nothing(rows):
    nothing = KroneckerFactors(torch.zeros(rows), torch.zeros(6, 6), 0.0)
    statistics = LayerStatistics(1, None, Moments(0.0, 0.0, 1), curvature=nothing, halves=(nothing, nothing))
    found = feedback_changes(problem_of({"one": nn.Linear(6, rows)}, {"one": statistics}))["one"]
    assert list(found.values()) == [0.0] * len(WIDTHS)


def test_a_half_that_the_loss_does_not_reach():
    """All rows of one half have no part in the loss: it judges that nothing costs anything."""
    rows = row_shares(9)
    nothing = KroneckerFactors(torch.zeros(9), torch.zeros(6, 6), 0.0)
    other = KroneckerFactors(rows, moments(6, 0), 0.4)
    statistics = LayerStatistics(1, None, Moments(0.0, 1.0, 1), curvature=other, halves=(nothing, other))
    problem = problem_of({"one": nn.Linear(6, 9)}, {"one": statistics})
    for grid, change in feedback_changes(problem)["one"].items():
        assert change == pytest.approx(crossed(problem.layers[0], grid, statistics), rel=1e-3) and change > 0


def test_no_feedback_among_the_candidates():
    statistics = statistics_of(row_shares(9), 6)
    problem = problem_of({"one": nn.Linear(6, 9)}, {"one": statistics})
    candidates = {"one": [one for one in problem.candidates["one"] if not one.grid or one.grid.rounding == "nearest"]}
    assert feedback_changes(dataclasses.replace(problem, candidates=candidates)) == {}


def test_rows_of_which_only_some_are_small(monkeypatch):
    """The layer's scales need float32 for one row's sake; a sample without that row does not."""
    monkeypatch.setattr(fitted_rounding, "SAMPLED_ROWS", 4)
    torch.manual_seed(0)
    module = nn.Linear(8, 40)
    module.weight.data[7] *= 1e-6
    rows = row_shares(40)
    problem = problem_of({"one": module}, {"one": statistics_of(rows, 8)})
    assert {one.grid.scale_dtype for one in problem.candidates["one"] if one.grid} == {"float32"}
    assert all(change > 0 for change in feedback_changes(problem)["one"].values())


def test_it_says_what_other_rows_of_a_calibration_say():
    """Fitted to few rows and judged by many others, against the prediction from the few."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 6))
    mixing = torch.randn(40, 40) / 6

    def batches(rows: int, seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(rows, 40, generator=generator) @ mixing
        targets = torch.randint(0, 6, (rows,), generator=generator)
        return [(inputs[part], targets[part]) for part in torch.arange(rows).chunk(4)]

    layer = find_layers(model)[0]
    few = calibrate(model, batches(96, 0), [layer], batch_loss, curvature=True)
    many = calibrate(model, batches(6000, 1), [layer], batch_loss, curvature=True).layers["0"].curvature
    grid = quantise(layer.matrix, Grid(bits=3, group_size=8, rounding="feedback")).grid
    problem = Problem(model, [], batch_loss, [layer], few, {"0": [Candidate(grid, 1)]})
    predicted = feedback_changes(problem)["0"][grid]
    error = error_of(layer, grid, few.layers["0"].curvature, FEEDBACK)
    truth = second_order_change(error, many)
    own = second_order_change(error, few.layers["0"].curvature)
    assert own < 0.8 * truth, "judged by its own rows it looks too good"
    assert 0.8 * truth < predicted < 2 * truth
