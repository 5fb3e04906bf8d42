"""Feedback from rows and columns, against two loops over single weights, and against its theorem."""

import pytest
import torch
from metrics_by_hand import DAMPING, curvature_of, dense
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.candidates.inverse_roots import InverseRoot, InverseRoots
from hf_lossless.candidates.two_sided import round_two_sided

SHAPES = pytest.mark.parametrize(
    "shape", [(5, 7), (7, 5), (32, 32), (33, 64), (40, 31), (70, 100), (1, 9), (9, 1), (1, 1)], ids=str
)
DIAGONALS = pytest.mark.parametrize("diagonal", ["", "rows", "columns", "rows columns"])


def problem(
    shape, diagonal: str = "", seed: int = 0, step: float = 1.0
) -> tuple[Tensor, InverseRoots, KroneckerFactors]:
    curvature = curvature_of(*shape, seed=seed, scale=1.0, diagonal=diagonal)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weights / step, InverseRoots.of(curvature, DAMPING), curvature


def rounded(weights: Tensor, sides: InverseRoots) -> Tensor:
    return batched([weights], [sides])[0]


def batched(weights: list[Tensor], sides: list[InverseRoots]) -> Tensor:
    return round_two_sided(
        torch.stack(weights),
        torch.stack([one.row_steps(1.0) for one in sides]),
        torch.stack([one.column_steps for one in sides]),
        [one.rows for one in sides],
        [one.columns for one in sides],
    )


def full_root(side: InverseRoot) -> Tensor:
    return (side.root.diag() if side.is_diagonal else side.root).double()


def in_order(matrix: Tensor, sides: InverseRoots) -> Tensor:
    return matrix.double()[sides.rows.order][:, sides.columns.order]


def by_loops(weights: Tensor, sides: InverseRoots) -> Tensor:
    """The docstring's sum, weight by weight, in float64."""
    W, V, U = in_order(weights, sides), full_root(sides.rows), full_root(sides.columns)
    step = in_order(sides.row_steps(1.0)[:, None] * sides.column_steps, sides)
    codes, errors = torch.zeros_like(W), torch.zeros_like(W)
    for k in range(W.shape[0]):
        for i in range(W.shape[1]):
            wanted = W[k, i].clone()
            for above in range(k + 1):
                for left in range(i + 1):
                    if (above, left) != (k, i):
                        wanted += V[above, k] * errors[above, left] * U[left, i]
            codes[k, i] = (wanted / step[k, i]).round()
            errors[k, i] = (codes[k, i] * step[k, i] - wanted) / (V[k, k] * U[i, i])
    unordered = torch.zeros_like(codes)
    unordered[sides.rows.order[:, None], sides.columns.order] = codes
    return unordered


@DIAGONALS
@pytest.mark.parametrize("shape", [(5, 7), (8, 6), (1, 9), (9, 1)], ids=str)
def test_against_loops(shape, diagonal):
    weights, sides, _ = problem(shape, diagonal)
    codes = rounded(weights, sides)
    assert codes.dtype == torch.float32
    assert torch.equal(codes.double(), by_loops(weights, sides))


@DIAGONALS
@SHAPES
@pytest.mark.parametrize("step", [0.2, 1.0], ids=["fine", "coarse"])
def test_every_code_is_the_nearest_to_its_target(shape, diagonal, step):
    """Targets follow from what was found: `E = V'^-1 d U^-1` and `t = q - V_kk U_ii E`."""
    weights, sides, _ = problem(shape, diagonal, step=step)
    codes = rounded(weights, sides)
    assert torch.equal(codes, codes.round())
    step = sides.row_steps(1.0)[:, None].double() * sides.column_steps.double()
    V, U = full_root(sides.rows), full_root(sides.columns)
    d = in_order(codes * step - weights, sides)
    errors = torch.linalg.inv(V.mT) @ d @ torch.linalg.inv(U)
    distance = V.diagonal()[:, None] * U.diagonal() * errors / in_order(step, sides)  # (q - t) / step
    assert distance.abs().max() <= 0.5 + 1e-3
    # Theorem: tr(R d C d') is the sum of E^2.
    R, C = (dense(factor, share) for factor, share in zip(problem_factors(shape, diagonal), (0.3, 0.1), strict=True))
    d = codes * step - weights
    torch.testing.assert_close((R @ d @ C @ d.mT).trace(), errors.square().sum(), rtol=1e-3, atol=0)


def problem_factors(shape, diagonal: str) -> tuple[Tensor, Tensor]:
    _, _, curvature = problem(shape, diagonal)
    return curvature.rows, curvature.columns


@DIAGONALS
def test_it_costs_less_than_rounding_to_nearest(diagonal):
    """In the mean over many matrices; with two diagonals it is rounding to nearest."""
    costs = torch.zeros(2, dtype=torch.float64)
    for seed in range(12):
        weights, sides, curvature = problem((24, 36), diagonal, seed=seed, step=0.5)
        R, C = dense(curvature.rows, DAMPING.rows), dense(curvature.columns, DAMPING.columns)
        step = sides.row_steps(1.0)[:, None] * sides.column_steps
        for place, codes in enumerate((rounded(weights, sides), (weights / step).round())):
            d = (codes * step - weights).double()
            costs[place] += (R @ d @ C @ d.mT).trace()
    if diagonal == "rows columns":
        assert costs[0] == costs[1]
    else:
        assert costs[0] < 0.9 * costs[1]
    torch.testing.assert_close(costs[0] / (12 * 24 * 36), torch.tensor(1 / 12).double(), rtol=0.05, atol=0)


@DIAGONALS
@SHAPES
def test_a_transposed_problem_has_the_transposed_answer(shape, diagonal):
    weights, sides, _ = problem(shape, diagonal)
    turned = round_two_sided(
        weights.mT[None], sides.column_steps[None], sides.row_steps(1.0)[None], [sides.columns], [sides.rows]
    )
    assert torch.equal(turned[0].mT, rounded(weights, sides))


@DIAGONALS
def test_a_batch_is_its_members(diagonal):
    problems = [problem((35, 50), diagonal, seed=seed) for seed in range(3)]
    together = batched([weights for weights, _, _ in problems], [sides for _, sides, _ in problems])
    for found, (weights, sides, _) in zip(together, problems, strict=True):
        assert torch.equal(found, rounded(weights, sides))


@DIAGONALS
def test_blocks_of_another_size_give_the_same_codes(diagonal, monkeypatch):
    """The order in which independent weights are taken does not matter."""
    weights, sides, _ = problem((37, 45), diagonal)
    codes = rounded(weights, sides)
    for block in (1, 5, 64):
        monkeypatch.setattr("hf_lossless.candidates.two_sided._BLOCK", block)
        monkeypatch.setattr("hf_lossless.candidates.two_sided._ROWS_AT_ONCE", block)
        assert torch.equal(rounded(weights, sides), codes)


def test_rows_in_another_order_have_their_codes_in_that_order():
    """The order of feedback is the metric's, and not that of the weights."""
    weights, sides, curvature = problem((20, 30))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    moved = KroneckerFactors(curvature.rows[order][:, order], curvature.columns, curvature.scale)
    assert torch.equal(rounded(weights[order], InverseRoots.of(moved, DAMPING)), rounded(weights, sides)[order])


def test_weights_on_their_levels_stay():
    _, sides, _ = problem((40, 33))
    codes = torch.randint(-9, 10, (40, 33)).float()
    weights = codes * (sides.row_steps(1.0)[:, None] * sides.column_steps)
    assert torch.equal(rounded(weights, sides), codes)


def test_the_input_is_left_alone():
    weights, sides, _ = problem((40, 33))
    before = weights.clone()
    rounded(weights, sides)
    assert torch.equal(weights, before)
