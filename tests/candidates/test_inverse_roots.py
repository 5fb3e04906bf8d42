"""The sides of a metric against dense formulas in float64."""

import math

import pytest
import torch
from metrics_by_hand import DAMPING, curvature_of, dense, second_moments, upper_root
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.candidates.inverse_roots import InverseRoot, InverseRoots

SIZE, SHARE = 23, 0.1
DIAGONAL = pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])


def factor_of(diagonal: bool) -> Tensor:
    factor = second_moments(SIZE, seed=4)
    return factor.diagonal().clone() if diagonal else factor


def ordered_root(side: InverseRoot, factor: Tensor) -> Tensor:
    """U of the damped factor in the side's order, float64."""
    return upper_root(dense(factor, SHARE)[side.order][:, side.order])


def unordered(side: InverseRoot, values: Tensor) -> Tensor:
    return torch.empty_like(values).index_copy_(0, side.order, values)


@DIAGONAL
def test_the_root_is_that_of_the_inverse(diagonal):
    factor = factor_of(diagonal)
    side = InverseRoot.of(factor, SHARE)
    assert side.is_diagonal == diagonal
    root = side.root.double().diag() if diagonal else side.root.double()
    assert torch.equal(root, root.triu())
    ordered = dense(factor, SHARE)[side.order][:, side.order]
    torch.testing.assert_close(root @ ordered @ root.mT, torch.eye(SIZE).double(), rtol=0, atol=1e-5)
    if not diagonal:
        assert (ordered.diagonal().diff() <= 1e-6).all()  # by falling H_ii


@DIAGONAL
def test_spreads_are_its_diagonal(diagonal):
    factor = factor_of(diagonal)
    side = InverseRoot.of(factor, SHARE)
    expected = unordered(side, ordered_root(side, factor).diagonal())
    torch.testing.assert_close(side.unit_steps.double(), expected, rtol=1e-4, atol=0)


@DIAGONAL
def test_the_first_entry_brings_nothing_and_a_diagonal_none(diagonal):
    factor = factor_of(diagonal)
    side = InverseRoot.of(factor, SHARE)
    shares = torch.rand(SIZE)
    root = ordered_root(side, factor)
    expected = torch.tensor(
        [sum(root[j, i].item() ** 2 * shares[side.order[j]].item() for j in range(i)) for i in range(SIZE)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(side.feedback_variance(shares).double(), unordered(side, expected), rtol=1e-4, atol=1e-7)
    assert diagonal == (not side.feedback_variance(shares).any())


@pytest.mark.parametrize(
    ("diagonal", "judge_diagonal"),
    [(False, False), (True, False), (True, True)],
    ids=["full", "judge-full", "diagonal"],
)
def test_charges(diagonal, judge_diagonal):
    factor, judge = factor_of(diagonal), second_moments(SIZE, seed=5)
    judge = judge.diagonal().clone() if judge_diagonal else judge
    side = InverseRoot.of(factor, SHARE)
    root = ordered_root(side, factor)
    full = (judge.diag() if judge_diagonal else judge).double()[side.order][:, side.order]
    expected = unordered(side, (root @ full @ root.mT).diagonal())
    torch.testing.assert_close(side.charges(judge).double(), expected, rtol=1e-4, atol=1e-7)


def test_its_own_damped_factor_charges_one():
    factor = factor_of(False)
    charges = InverseRoot.of(factor, SHARE).charges(dense(factor, SHARE).float())
    torch.testing.assert_close(charges, torch.ones(SIZE), rtol=1e-4, atol=0)


@DIAGONAL
def test_where_nothing_is_known_it_is_the_identity(diagonal):
    side = InverseRoot.of(torch.zeros(5) if diagonal else torch.zeros(5, 5), SHARE)
    assert torch.equal(side.unit_steps, torch.ones(5))
    assert not side.feedback_variance(torch.ones(5)).any()


@pytest.mark.parametrize("diagonal", ["", "rows", "columns", "rows columns"])
def test_steps_are_those_at_which_every_weight_costs_the_same(diagonal):
    curvature = curvature_of(12, 17, scale=0.02, diagonal=diagonal)
    sides = InverseRoots.of(curvature, DAMPING)
    steps = sides.row_steps(0.7)[:, None] * sides.column_steps
    expected = 0.7 / math.sqrt(0.02) * sides.rows.unit_steps[:, None] * sides.columns.unit_steps
    torch.testing.assert_close(steps, expected)
    torch.testing.assert_close(sides.rows.unit_steps, InverseRoot.of(curvature.rows, DAMPING.rows).unit_steps)
    torch.testing.assert_close(sides.columns.unit_steps, InverseRoot.of(curvature.columns, DAMPING.columns).unit_steps)


def test_what_the_data_never_excite_has_the_largest_steps():
    columns = second_moments(8, seed=1)
    columns[3], columns[:, 3] = 0, 0
    sides = InverseRoots.of(KroneckerFactors(second_moments(8, seed=2), columns, 1.0), DAMPING)
    assert sides.column_steps.argmax() == 3
