"""LoD's truncation: its first-order effect, its rank, its tolerance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lossless.candidates.descent import TOLERANCE, aligned_factors, largest_errors, smallest_rank
from hf_lossless.candidates.low_rank import Factors, factorise


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def first_order(factors: Factors, matrix: Tensor, gradient: Tensor) -> float:
    """<g, d>, from its definition."""
    error = factors.left.double() @ factors.right.double() - matrix.double()
    return (gradient.double() * error).sum().item()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_the_error_never_points_up_the_gradient(rows, columns, rank, seed):
    rank = min(rank, rows, columns)
    matrix, gradient = draw(rows, columns, seed=seed), draw(rows, columns, seed=seed + 1)
    factorisation = factorise(matrix)
    plain, aligned = factorisation.truncated(rank), aligned_factors(factorisation, rank, matrix, gradient)
    assert aligned.left.shape == plain.left.shape and aligned.right.shape == plain.right.shape
    size = gradient.norm().item() * matrix.norm().item()
    assert first_order(aligned, matrix, gradient) <= 1e-5 * size
    if first_order(plain, matrix, gradient) <= -1e-5 * size:
        assert torch.equal(aligned.left, plain.left) and torch.equal(aligned.right, plain.right)
    assert int((torch.linalg.svdvals(aligned.left.double() @ aligned.right.double()) > 1e-5).sum()) <= rank


def test_the_formula_and_the_shortest_step():
    """d = -tail - eta U_c (U_c' g V_c) V_c', with the eta that makes <g, d> zero."""
    matrix, gradient, rank = draw(9, 7), draw(9, 7, seed=1), 3
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    tail = U[:, rank:] * S[rank:] @ Vt[rank:]
    if (gradient * -tail).sum() <= 0:
        gradient = -gradient
    g = gradient.double()
    U, Vt = U[:, :rank], Vt[:rank]
    inside = U.T @ g @ Vt.T
    eta = max(0.0, -(g * tail).sum().item()) / inside.square().sum()
    expected = matrix - tail - eta * U @ inside @ Vt
    factors = aligned_factors(factorise(matrix), rank, matrix, gradient)
    torch.testing.assert_close(factors.left.double() @ factors.right.double(), expected, rtol=1e-4, atol=1e-5)
    assert abs(first_order(factors, matrix, gradient)) < 1e-4
    # No shorter change within the same subspace does it: the change is along the gradient's own part of it.
    change = factors.left.double() @ factors.right.double() - (matrix - tail)
    assert change.norm().item() == pytest.approx((-(g * tail).sum() / inside.norm()).abs().item(), rel=1e-4)


def test_a_gradient_that_is_zero_or_outside_changes_nothing():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    factorisation = factorise(matrix)
    outside = torch.diag(torch.tensor([0.0, 0.0, -1.0]))  # the truncation raises the loss, the subspace cannot help
    for gradient in (torch.zeros(3, 3), outside):
        factors, plain = aligned_factors(factorisation, 2, matrix, gradient), factorisation.truncated(2)
        assert torch.equal(factors.left, plain.left) and torch.equal(factors.right, plain.right)


def test_a_zero_matrix_and_a_rank_above_the_numerical_one():
    for matrix in (torch.zeros(5, 4), draw(5, 1) @ draw(1, 4, seed=1)):
        for seed in range(4):
            factors = aligned_factors(factorise(matrix), 3, matrix, draw(5, 4, seed=seed))
            assert torch.isfinite(factors.left).all() and torch.isfinite(factors.right).all()
            torch.testing.assert_close(factors.left @ factors.right, matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_parameter_leaves_no_graph(dtype):
    parameter = nn.Parameter(draw(6, 8).to(dtype))
    gradients = [sign * draw(6, 8, seed=1) for sign in (1, -1)]
    factorisation = factorise(parameter)
    for gradient in gradients:
        factors = aligned_factors(factorisation, 3, parameter, gradient)
        assert not factors.left.requires_grad and factors.left.dtype == torch.float32
        assert first_order(factors, parameter.detach(), gradient) <= 1e-4
    assert smallest_rank(factorisation, parameter, gradients[0], 6) == 6


@pytest.mark.parametrize("shape", [(9, 7), (5, 12), (1, 4)], ids=str)
def test_largest_errors(shape):
    matrix = draw(*shape)
    factorisation = factorise(matrix)
    expected = [
        (factors.left @ factors.right - matrix).abs().max()
        for factors in map(factorisation.truncated, range(1, min(shape) + 1))
    ]
    torch.testing.assert_close(
        largest_errors(factorisation, matrix, min(shape)), torch.stack(expected), rtol=1e-4, atol=1e-6
    )
    assert len(largest_errors(factorisation, matrix, 1)) == 1
    assert len(largest_errors(factorisation, matrix, 100)) == min(shape)


def by_brute_force(matrix: Tensor, gradient: Tensor, largest: int, tolerance: float) -> int | None:
    """Ranks from the smallest up; each truncated anew, aligned, and every element compared."""
    for rank in range(1, largest + 1):
        factorisation = factorise(matrix)
        plain, aligned = factorisation.truncated(rank), aligned_factors(factorisation, rank, matrix, gradient)
        errors = [(one.left @ one.right - matrix).abs() for one in (plain, aligned)]
        if all(error <= tolerance for both in errors for error in both.flatten().tolist()):
            return rank
    return None


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.5, 1.0, 2.0])
def test_smallest_rank_equals_brute_force(tolerance):
    found = set()
    for seed in range(8):
        matrix = draw(10, 8, seed=seed) * 0.7 ** torch.arange(8)
        for gradient in (draw(10, 8, seed=seed + 50), 0.01 * draw(10, 8, seed=seed + 90), torch.zeros(10, 8)):
            for largest in (2, 8):
                rank = smallest_rank(factorise(matrix), matrix, gradient, largest, tolerance)
                assert rank == by_brute_force(matrix, gradient, largest, tolerance)
                found.add(rank)
    assert len(found) > 1


def test_smallest_rank_of_a_low_rank_matrix():
    matrix = draw(20, 4) @ draw(4, 30, seed=1)
    gradient = draw(20, 30, seed=2)
    assert smallest_rank(factorise(matrix), matrix, gradient, 10) == 4
    assert smallest_rank(factorise(matrix), matrix, gradient, 3) is None
    assert smallest_rank(factorise(matrix * 1e-6), matrix * 1e-6, gradient * 0, 10) == 1
    assert TOLERANCE == 1e-2


@pytest.mark.parametrize("power", [-120, -60, 60, 100])
def test_the_size_of_the_gradient_does_not_matter(power):
    matrix, gradient = draw(9, 7), draw(9, 7, seed=1)
    factorisation = factorise(matrix)
    if first_order(factorisation.truncated(3), matrix, gradient) <= 0:
        gradient = -gradient
    expected = aligned_factors(factorisation, 3, matrix, gradient)
    assert not torch.equal(expected.right, factorisation.truncated(3).right)
    found = aligned_factors(factorisation, 3, matrix, gradient * 2.0**power)
    assert torch.equal(found.left, expected.left)
    torch.testing.assert_close(found.right, expected.right)
