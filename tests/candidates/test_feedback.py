"""Feedback against optimal brain quantisation written out, scales against least squares, descent against trying all."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hf_lossless.candidates import feedback
from hf_lossless.candidates.damping import FEEDBACK, FEEDBACK_OF_EMBEDDINGS, feedback_damping
from hf_lossless.candidates.feedback import (
    Metric,
    _Lattice,
    coordinate_descent,
    error_feedback,
    quantise_in_metric,
    refit_scales,
)
from hf_lossless.candidates.uniform import on_grid, quantise
from hf_lossless.storage.grid import QuantisedMatrix, dequantise, symmetric_zero
from hf_lossless.storage.plan import Grid

SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
GROUPS = pytest.mark.parametrize("group_size", [None, 5, 8], ids=["row", "g5", "g8"])
BLOCKS = pytest.mark.parametrize("block", [1, 3, 64], ids="block{}".format)
METRICS = ["full", "one-row", "dead", "zero", "scaled"]


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moments(columns: int, seed: int = 0, kind: str = "full") -> Tensor:
    """Second moments of inputs that are far from independent, with a mean diagonal of one."""
    if kind == "zero":
        return torch.zeros(columns, columns)
    inputs = random_matrix(1 if kind == "one-row" else 3 * columns, columns, seed)
    inputs = inputs + 2 * random_matrix(1, columns, seed + 1) * inputs[:, :1]
    if kind == "dead":
        inputs[:, ::2] = 0
    elif kind == "scaled":
        inputs *= 10.0 ** torch.linspace(-3, 3, columns)
    moment = inputs.T @ inputs
    return moment / moment.diagonal().mean().clamp(min=1e-30)


def values_of(quantised: QuantisedMatrix) -> Tensor:
    return dequantise(quantised.codes, quantised.scales, quantised.zeros, quantised.grid)


def damped(columns: Tensor, damping: float = FEEDBACK) -> Tensor:
    """H, float64."""
    columns = columns.double()
    mean = columns.diagonal().mean()
    return columns + (damping * mean if mean else 1.0) * torch.eye(len(columns)).double()


def costs(error: Tensor, cost: Tensor) -> Tensor:
    """d H d' of every row, float64."""
    error, cost = error.double(), cost.double()
    return torch.einsum("ri,ij,rj->r", error, cost, error)


def costs_of(quantised: QuantisedMatrix, matrix: Tensor, columns: Tensor, damping: float = FEEDBACK) -> Tensor:
    return costs(values_of(quantised) - matrix, damped(columns, damping))


def alone(matrix: Tensor, grid: Grid, columns: Tensor, damping: float = FEEDBACK) -> QuantisedMatrix:
    """One matrix on one grid."""
    [[quantised]] = quantise_in_metric(matrix[None], [[grid]], columns[None], damping)
    return quantised


def exact(metric: Metric) -> Metric:
    """The same metric in float64, so that a border between two codes is not crossed by rounding."""
    cost = metric.cost.double()
    ordered = cost.take_along_dim(metric.order[:, :, None], 1).take_along_dim(metric.order[:, None, :], 2)
    return Metric(cost, metric.order, torch.linalg.cholesky(torch.linalg.inv(ordered), upper=True))


def lattice_of(batch: int, columns: int, rows: int, bits: int, symmetric: bool, group_size: int | None, seed: int = 0):
    """Random scales and zeros of groups, float64, and each column's group."""
    groups = torch.arange(columns) // (group_size or columns)
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, int(groups.max()) + 1, rows)
    scales = (0.2 + torch.rand(shape, generator=generator).double()) * 4 / 2**bits
    zeros = torch.full((batch, 1, rows), symmetric_zero(Grid(bits=bits))).double()
    if not symmetric:
        zeros = (torch.rand(shape, generator=generator).double() * 2**bits)[:, groups]
    last_codes = torch.full((batch, 1, rows), 2.0**bits - 1).double()
    return _Lattice(scales[:, groups], zeros, last_codes), scales, groups


def assert_alike(found: QuantisedMatrix, expected: QuantisedMatrix, matrix: Tensor, columns: Tensor) -> None:
    """The same, but for what rounding in another order of sums does to a code here and there."""
    assert found.grid == expected.grid and found.scales.dtype == expected.scales.dtype
    assert (found.zeros is None) == (expected.zeros is None)
    assert (found.codes == expected.codes).float().mean() > 0.98
    totals = [costs_of(one, matrix, columns).sum().item() for one in (found, expected)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-2, abs=1e-12)


def test_damping_by_kind():
    assert feedback_damping("embedding") == FEEDBACK_OF_EMBEDDINGS
    assert {feedback_damping(kind) for kind in ("linear", "conv1d", "conv2d")} == {FEEDBACK}


# The metric.


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("columns", [1, 2, 17], ids="{}columns".format)
def test_the_metric_by_its_definition(kind, columns):
    batch = torch.stack([moments(columns, seed, kind) for seed in range(3)])
    before = batch.clone()
    metric = Metric.of(batch, 0.1)
    assert torch.equal(batch, before)
    for one, cost, order, root, weights in zip(
        batch, metric.cost, metric.order, metric.root, metric.column_weights, strict=True
    ):
        expected = damped(one, 0.1)
        torch.testing.assert_close(cost.double(), expected, rtol=1e-6, atol=1e-7)
        assert sorted(order.tolist()) == list(range(columns))
        assert (expected.diagonal()[order].diff() <= 1e-6 * expected.diagonal().max()).all()
        assert torch.equal(root, root.triu()) and (root.diagonal() > 0).all()
        inverse = torch.linalg.inv(expected[order][:, order])
        close = 1e-4 * inverse.abs().max().item()
        torch.testing.assert_close((root.T @ root).double(), inverse, rtol=1e-3, atol=close)
        # 1 / U_ii^2: what is left of H_ii once the later columns have taken what they can
        for place, column in enumerate(order.tolist()):
            later = order[place + 1 :]
            rest = expected[column, column]
            if len(later):
                across = expected[column, later]
                rest = rest - across @ torch.linalg.solve(expected[later][:, later], across)
            assert weights[column].item() == pytest.approx(rest.item(), rel=1e-2)


def test_of_a_layer_without_inputs_the_metric_is_the_identity():
    batch = torch.stack([torch.zeros(4, 4), moments(4)])
    metric = Metric.of(batch, FEEDBACK)
    assert torch.equal(metric.cost[0], torch.eye(4)) and torch.equal(metric.root[0], torch.eye(4))
    assert not torch.equal(metric.cost[1], torch.eye(4))
    assert torch.equal(metric.column_weights[0], torch.ones(4))


# Error feedback.


def eliminated(
    weights: Tensor, scales: Tensor, zeros: Tensor, last_code: float, cost: Tensor, order: list[int]
) -> tuple[list[int], list[float]]:
    """Optimal brain quantisation of one row: rounded columns leave the inverse of H, one after the other.

    Returns:
        Codes, and the errors e_i whose squares add to the cost.
    """
    weights, inverse, left = weights.clone(), torch.linalg.inv(cost[order][:, order]), list(order)
    codes, errors = [0] * len(order), []
    while left:
        column = left[0]
        code = (weights[column] / scales[column] + zeros[column]).round().clamp(0, last_code)
        error = weights[column] - scales[column] * (code - zeros[column])
        pivot = inverse[0, 0]
        codes[column] = int(code)
        errors.append((error / pivot.sqrt()).item())
        weights[left[1:]] -= error / pivot * inverse[0, 1:]
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / pivot)[1:, 1:]
        left = left[1:]
    return codes, errors


@SYMMETRIES
@GROUPS
@BLOCKS
@pytest.mark.parametrize("kind", ["full", "one-row", "dead", "zero"])
def test_feedback_is_optimal_brain_quantisation(kind, block, group_size, symmetric, monkeypatch):
    """And its cost d H d' is the sum of e_i^2."""
    monkeypatch.setattr(feedback, "_BLOCK", block)
    batch, columns, rows, bits = 2, 13, 4, 3
    metric = exact(Metric.of(torch.stack([moments(columns, seed, kind) for seed in range(batch)]), FEEDBACK))
    weights = torch.stack([random_matrix(columns, rows, 7 + seed) for seed in range(batch)]).double()
    before = weights.clone()
    lattice, _, _ = lattice_of(batch, columns, rows, bits, symmetric, group_size)
    codes = error_feedback(weights, lattice, metric)
    assert torch.equal(weights, before)
    zeros = lattice.zeros.expand_as(weights)
    for member, row in itertools.product(range(batch), range(rows)):
        place = (member, slice(None), row)
        expected, errors = eliminated(
            weights[place],
            lattice.scales[place],
            zeros[place],
            2**bits - 1,
            metric.cost[member],
            metric.order[member].tolist(),
        )
        assert codes[place].tolist() == expected
        d = lattice.scales[place] * (codes[place] - zeros[place]) - weights[place]
        assert (d @ metric.cost[member] @ d).item() == pytest.approx(sum(e * e for e in errors), rel=1e-8)


def test_inside_the_range_no_error_is_above_half_a_step():
    """Babai's bound: |(d U^-1)_i U_ii| <= scale / 2, so that the cost is at most that of half a step everywhere."""
    columns, rows = 12, 30
    metric = exact(Metric.of(moments(columns)[None], FEEDBACK))
    weights = random_matrix(columns, rows)[None].double()
    scales = torch.full((1, columns, rows), 0.5).double()
    lattice = _Lattice(scales, torch.full((1, 1, rows), 512.0).double(), torch.full((1, 1, rows), 1023.0).double())
    codes = error_feedback(weights, lattice, metric)
    error = (scales * (codes - 512) - weights)[0, metric.order[0]].T
    scaled = torch.linalg.solve_triangular(metric.root[0], error, upper=True, left=False)
    moved = (scaled * metric.root[0].diagonal()).abs()
    assert moved.max() <= 0.25 + 1e-9 and moved.max() > 0.2
    bound = (0.25**2 * metric.column_weights).sum()
    assert (costs(error, metric.cost[0][metric.order[0]][:, metric.order[0]]) <= bound).all()


def test_under_the_identity_feedback_rounds_to_nearest():
    weights = random_matrix(9, 6)[None]
    lattice, _, _ = lattice_of(1, 9, 6, 4, True, None)
    codes = error_feedback(weights.double(), lattice, exact(Metric.of(torch.zeros(1, 9, 9), FEEDBACK)))
    nearest = (weights / lattice.scales + lattice.zeros).round().clamp(0, 15)
    assert torch.equal(codes, nearest)


# Scales.


@GROUPS
@pytest.mark.parametrize("kind", ["full", "dead", "zero"])
def test_scales_are_those_of_least_squares(kind, group_size):
    batch, columns, rows, bits = 2, 13, 5, 3
    cost = torch.stack([damped(moments(columns, seed, kind)) for seed in range(batch)])
    weights = torch.stack([random_matrix(columns, rows, seed) for seed in range(batch)])
    lattice, scales, groups = lattice_of(batch, columns, rows, bits, True, group_size)
    levels = ((weights / lattice.scales + lattice.zeros).round().clamp(0, 7) - lattice.zeros).float()
    found = refit_scales(cost.float() @ weights.float(), levels, scales.float(), groups, cost.float(), torch.float32)
    assert found.shape == scales.shape
    for member, row in itertools.product(range(batch), range(rows)):
        root = torch.linalg.cholesky(cost[member])  # H = L L': |v L|^2 = v H v'
        design = root.T @ (levels[member, :, row, None].double() * F.one_hot(groups))
        target = root.T @ weights[member, :, row].double()
        expected = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution[:, 0]
        residuals = [
            (design @ one.double() - target).square().sum().item() for one in (found[member, :, row], expected)
        ]
        assert residuals[0] == pytest.approx(residuals[1], rel=1e-5)
        torch.testing.assert_close(found[member, :, row].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_scales_are_returned_as_they_are_stored(dtype):
    weights, cost = random_matrix(12, 40)[None], damped(moments(12)).float()[None]
    lattice, scales, groups = lattice_of(1, 12, 40, 2, True, 4)
    scales = scales.to(dtype).float()
    levels = ((weights / scales[:, groups] + lattice.zeros).round().clamp(0, 3) - lattice.zeros).float()
    found = refit_scales(cost.float() @ weights.float(), levels, scales, groups, cost, dtype)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.to(dtype).float()) and not torch.equal(found, scales)


def test_codes_of_a_group_that_are_all_zero_keep_its_scale():
    """Whatever the scale, the group stands for zeros; the other's equations are solved all the same."""
    weights, cost = random_matrix(8, 3)[None], damped(moments(8)).float()[None]
    levels = torch.ones(1, 8, 3)
    levels[:, :4] = 0
    scales = torch.full((1, 2, 3), 0.25)
    found = refit_scales(cost.float() @ weights.float(), levels, scales, torch.arange(8) // 4, cost, torch.float32)
    torch.testing.assert_close(found[:, 0], scales[:, 0])
    assert not torch.isclose(found[:, 1], scales[:, 1]).any()
    nothing = refit_scales(
        cost.float() @ weights.float(), torch.zeros(1, 8, 3), scales, torch.arange(8) // 4, cost, torch.float32
    )
    assert torch.equal(nothing, scales)


# Descent.


def swept(codes: Tensor, weights: Tensor, scales: Tensor, zeros: Tensor, last_code: float, cost: Tensor) -> Tensor:
    """One sweep over one row: each code is tried at every level, the others as they are."""
    codes = codes.clone()
    for column in range(len(codes)):
        tried = []
        for level in range(int(last_code) + 1):
            codes[column] = level
            d = scales * (codes - zeros) - weights
            tried.append((d @ cost @ d).item())
        codes[column] = min(range(len(tried)), key=tried.__getitem__)
    return codes


@SYMMETRIES
@GROUPS
@BLOCKS
def test_descent_takes_the_best_level_of_each_column(block, group_size, symmetric, monkeypatch):
    monkeypatch.setattr(feedback, "_BLOCK", block)
    batch, columns, rows, bits = 2, 11, 3, 2
    cost = torch.stack([damped(moments(columns, seed)) for seed in range(batch)])
    weights = torch.stack([random_matrix(columns, rows, seed) for seed in range(batch)]).double()
    lattice, _, _ = lattice_of(batch, columns, rows, bits, symmetric, group_size)
    start = torch.randint(0, 4, weights.shape, generator=torch.Generator().manual_seed(0)).double()
    found = coordinate_descent(start.clone(), weights, lattice, cost)
    zeros = lattice.zeros.expand_as(weights)
    for member, row in itertools.product(range(batch), range(rows)):
        place = (member, slice(None), row)
        expected = swept(start[place], weights[place], lattice.scales[place], zeros[place], 3, cost[member])
        assert torch.equal(found[place], expected)


@SYMMETRIES
def test_once_descent_stands_still_no_single_code_can_do_better(symmetric):
    """And the best of all codes together is no worse than it, nor far below."""
    columns, rows, bits = 4, 6, 2
    cost = damped(moments(columns))
    weights = random_matrix(columns, rows).double()[None]
    lattice, _, _ = lattice_of(1, columns, rows, bits, symmetric, 2)
    codes = error_feedback(weights, lattice, exact(Metric.of(moments(columns)[None], FEEDBACK)))
    for _ in range(50):
        before = codes.clone()
        codes = coordinate_descent(codes, weights, lattice, cost[None])
        if torch.equal(before, codes):
            break
    else:
        pytest.fail("descent goes in circles")
    every = torch.cartesian_prod(*[torch.arange(4.0).double()] * columns)
    for row in range(rows):
        zeros = lattice.zeros[0].expand(columns, rows)[:, row]
        scales, target, own = lattice.scales[0, :, row], weights[0, :, row], codes[0, :, row]
        all_costs = costs(scales * (every - zeros) - target, cost)
        reached = costs((scales * (own - zeros) - target)[None], cost).item()
        neighbours = (every != own).sum(1) <= 1
        assert neighbours.sum() == 1 + 3 * columns
        assert reached <= all_costs[neighbours].min() * (1 + 1e-9)
        assert all_costs.min() * (1 - 1e-9) <= reached <= 6 * all_costs.min()


# All of it.


def without_rounds(matrix: Tensor, grid: Grid, columns: Tensor) -> QuantisedMatrix:
    """What feedback alone gives."""
    with mock.patch.object(feedback, "ROUNDS", 0):
        return alone(matrix, grid, columns)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Grid, Tensor]:
    rows, columns, seed = draw(st.integers(1, 5)), draw(st.integers(1, 20)), draw(st.integers(0, 2**20))
    matrix = random_matrix(rows, columns, seed)
    for row in matrix:
        kind = draw(st.sampled_from(["bell", "bell", "constant", "zero", "outlier", "sparse", "half-zero"]))
        if kind == "constant":
            row.fill_(-0.3)
        elif kind == "zero":
            row.zero_()
        elif kind == "outlier":
            row[0] = 30
        elif kind == "sparse":
            row[1::2] = 0
        elif kind == "half-zero":
            row[: columns // 2] = 0
    matrix = matrix * 10.0 ** draw(st.sampled_from([0, 0, 0, -2, 2, -6, 6, -12, 12, -30, 30]))
    grid = Grid(
        bits=draw(st.integers(1, 8)),
        group_size=draw(st.none() | st.integers(1, 12)),
        symmetric=draw(st.booleans()),
        rounding="feedback",
    )
    grid = quantise(matrix, grid).grid  # the scale dtype as a plan would have it
    if draw(st.booleans()):
        grid = grid.model_copy(update={"scale_dtype": "float32"})
    return matrix, grid, moments(columns, seed, draw(st.sampled_from(METRICS)))


@settings(deadline=None, max_examples=150)
@given(problems())
def test_every_matrix_on_every_grid(problem):
    """Whole numbers within the width; neither scales nor descent raise the cost of any row."""
    matrix, grid, columns = problem
    before = matrix.clone(), columns.clone()
    found = alone(matrix, grid, columns)
    assert torch.equal(matrix, before[0]) and torch.equal(columns, before[1])
    assert found.codes.dtype == torch.uint8 and found.codes.shape == matrix.shape
    assert int(found.codes.max()) < 2**grid.bits
    groups = grid.num_groups(matrix.shape[1])
    assert found.grid == grid and found.scales.shape == (len(matrix), groups)
    assert found.scales.dtype == getattr(torch, grid.scale_dtype)
    assert (found.zeros is None) == grid.symmetric
    assert found.zeros is None or (found.zeros.shape, found.zeros.dtype) == (found.scales.shape, found.scales.dtype)
    values = values_of(found)
    assert torch.isfinite(values).all()
    assert not values[~matrix.any(1)].any()
    start = costs_of(without_rounds(matrix, grid, columns), matrix, columns)
    size = (damped(columns).diagonal().sum() * matrix.double().square().amax(1)).clamp(min=1e-300)
    assert (costs_of(found, matrix, columns) <= start * (1 + 1e-3) + 1e-9 * size).all()


@SYMMETRIES
@GROUPS
@pytest.mark.parametrize("bits", range(1, 9), ids="{}bit".format)
def test_it_costs_less_than_rounding_to_nearest(bits, group_size, symmetric):
    matrix, columns = random_matrix(24, 36), moments(36)
    grid = quantise(matrix, Grid(bits=bits, group_size=group_size, symmetric=symmetric, rounding="feedback")).grid
    nearest = costs(on_grid(matrix, grid) - matrix, damped(columns)).sum()
    assert costs_of(alone(matrix, grid, columns), matrix, columns).sum() < 0.6 * nearest


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e30], ids=str)
@SYMMETRIES
def test_magnitudes(magnitude, symmetric):
    """At every size of the weights it is better than rounding to nearest."""
    matrix, columns = random_matrix(16, 24), moments(24)
    grid = Grid(bits=3, group_size=8, symmetric=symmetric, rounding="feedback", scale_dtype="float32")
    unit = costs_of(alone(matrix, grid, columns), matrix, columns).sum()
    scaled = values_of(alone(matrix * magnitude, grid, columns)).double() / magnitude - matrix
    nearest = costs(on_grid(matrix, grid) - matrix, damped(columns)).sum()
    total = costs(scaled, damped(columns)).sum()
    assert total < 0.6 * nearest
    assert total <= unit * (1.02 if 1e-15 < magnitude < 1e15 else 1.6)  # beyond, squares leave float32: old scales stay


@SYMMETRIES
def test_members_of_a_batch_do_not_see_each_other(symmetric):
    matrices = torch.stack([random_matrix(9, 21, seed) for seed in range(4)])
    columns = torch.stack([moments(21, seed, kind) for seed, kind in enumerate(["full", "zero", "dead", "one-row"])])
    widths = [2, 4, 2, 3]
    grids = [[Grid(bits=bits, group_size=8, symmetric=symmetric, rounding="feedback")] for bits in widths]
    together = quantise_in_metric(matrices, grids, columns, FEEDBACK)
    for matrix, [grid], own, [found] in zip(matrices, grids, columns, together, strict=True):
        assert_alike(found, alone(matrix, grid, own), matrix, own)


@SYMMETRIES
def test_grids_side_by_side_are_as_each_alone(symmetric):
    matrices = torch.stack([random_matrix(9, 21, seed) for seed in range(2)])
    columns = torch.stack([moments(21, seed) for seed in range(2)])
    grids = [
        [Grid(bits=bits, group_size=8, symmetric=symmetric, rounding="feedback") for bits in widths]
        for widths in ((1, 2, 3, 4, 8), (8, 1, 4, 2, 3))
    ]
    together = quantise_in_metric(matrices, grids, columns, FEEDBACK)
    for matrix, own_grids, own, found in zip(matrices, grids, columns, together, strict=True):
        assert [one.grid for one in found] == own_grids
        for grid, one in zip(own_grids, found, strict=True):
            assert_alike(one, alone(matrix, grid, own), matrix, own)


@SYMMETRIES
@pytest.mark.parametrize("at_once", [1, 4, 5], ids="{}rows".format)
def test_rows_at_once(at_once, symmetric, monkeypatch):
    matrices, columns = random_matrix(10, 12)[None].repeat(2, 1, 1), torch.stack([moments(12), moments(12, 3)])
    grids = [[Grid(bits=bits, group_size=5, symmetric=symmetric, rounding="feedback") for bits in (2, 4)]] * 2
    whole = quantise_in_metric(matrices, grids, columns, FEEDBACK)
    monkeypatch.setattr(feedback, "_ROWS_AT_ONCE", at_once)
    parts = quantise_in_metric(matrices, grids, columns, FEEDBACK)
    for member in range(2):
        for one, other in zip(parts[member], whole[member], strict=True):
            assert one.scales.shape == other.scales.shape
            assert_alike(one, other, matrices[member], columns[member])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)], ids=str)
@SYMMETRIES
@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_one_row_or_one_column(shape, symmetric, diagonal):
    matrix, columns = random_matrix(*shape), moments(shape[1])
    grid = Grid(bits=4, symmetric=symmetric, rounding="feedback")
    found = alone(matrix, grid, columns.diagonal() if diagonal else columns)
    assert (values_of(found) - matrix).abs().max() < 0.6
    if shape[1] == 1:  # one weight to a scale
        torch.testing.assert_close(values_of(found), matrix, rtol=2e-3, atol=0)


@SYMMETRIES
@pytest.mark.parametrize("kind", ["full", "zero"])
def test_of_a_diagonal_metric_only_the_scales_are_searched(symmetric, kind):
    """Every weight goes to its nearest level."""
    matrices = torch.stack([random_matrix(7, 18, seed) for seed in range(2)])
    diagonals = torch.stack([moments(18, seed, kind).diagonal() for seed in range(2)])
    grids = [[Grid(bits=bits, group_size=5, symmetric=symmetric, rounding="feedback") for bits in (2, 4)]] * 2
    found = quantise_in_metric(matrices, grids, diagonals, FEEDBACK)
    for matrix, diagonal, own_grids, results in zip(matrices, diagonals, grids, found, strict=True):
        for grid, one in zip(own_grids, results, strict=True):
            weights = damped(torch.diag(diagonal)).diagonal().float()
            expected = quantise(matrix, grid, weights)
            assert one.grid == grid
            assert torch.equal(one.codes, expected.codes) and torch.equal(one.scales, expected.scales)
            # The full metric with that very diagonal can do the same, and fit the scales of its codes.
            full = alone(matrix, grid, torch.diag(diagonal))
            costs_of_both = [costs_of(which, matrix, torch.diag(diagonal)).sum() for which in (full, one)]
            assert costs_of_both[0] <= costs_of_both[1] * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_taken_as_float32(dtype):
    matrix, columns = random_matrix(3, 20).to(dtype), moments(20)
    grid = Grid(bits=3, group_size=8, rounding="feedback")
    found, expected = alone(matrix, grid, columns), alone(matrix.float(), grid, columns)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


def test_a_plan_may_store_scales_in_more_than_these_rows_need():
    """Some rows of a layer, or a batch of them, may fit float16 where others do not."""
    matrix, columns = random_matrix(4, 12), moments(12)
    for symmetric, metric in itertools.product([True, False], [columns, columns.diagonal()]):
        grids = [
            Grid(bits=3, group_size=5, symmetric=symmetric, rounding="feedback", scale_dtype=dtype)
            for dtype in ("float16", "float32")
        ]
        half, single = (alone(matrix, grid, metric) for grid in grids)
        assert half.scales.dtype == torch.float16 and single.scales.dtype == torch.float32
        torch.testing.assert_close(values_of(half), values_of(single), rtol=0, atol=1.0)


def test_scales_stay_in_the_range_of_their_dtype():
    """Of weights that the plan's float16 cannot hold the ends are cut, and nothing is infinite."""
    grid = Grid(bits=2, rounding="feedback")
    found = alone(1e7 * random_matrix(4, 12), grid, moments(12))
    assert found.scales.dtype == torch.float16 and torch.isfinite(found.scales).all()


def test_without_gradients():
    matrix = torch.nn.Parameter(random_matrix(3, 6))
    assert not alone(matrix, Grid(bits=2, rounding="feedback"), moments(6)).scales.requires_grad
