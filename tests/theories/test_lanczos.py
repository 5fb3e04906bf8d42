"""Lanczos against a dense solver and against ARPACK."""

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from hf_lossless.theories.lanczos import lanczos


def symmetric(eigenvalues: list[float], seed: int = 0) -> Tensor:
    """A dense matrix with these eigenvalues."""
    size = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


# A few sharp directions, a bulk: as Hessians of networks are
DEFINITE = [50.0, 20.0, 11.0, 6.0, *[1.0 / (k + 1) for k in range(196)]]
INDEFINITE = [50.0, 20.0, -35.0, 6.0, -9.0, *[(-1) ** k / (k + 1) for k in range(195)]]

DOUBLE = torch.zeros(0, dtype=torch.float64)


def times(matrix: Tensor):
    return lambda vector: matrix.to(vector) @ vector


def true_residuals(matrix: Tensor, pairs) -> Tensor:
    vectors = pairs.vectors.double()
    return (matrix @ vectors - vectors * pairs.values).norm(dim=0)


@pytest.mark.parametrize("eigenvalues", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
@pytest.mark.parametrize("which", ["largest", "magnitude"])
@pytest.mark.parametrize("starts", [1, 3])
def test_leading_eigenpairs(eigenvalues, which, starts):
    matrix = symmetric(eigenvalues)
    pairs = lanczos(times(matrix), 200, count=4, which=which, starts=starts, tolerance=1e-4, like=DOUBLE)
    expected = sorted(eigenvalues, key=abs if which == "magnitude" else None, reverse=True)[:4]
    assert pairs.status == "converged" and pairs.num_products < 60
    torch.testing.assert_close(pairs.values.tolist(), expected, rtol=1e-3, atol=0)
    assert (true_residuals(matrix, pairs) <= 1e-4 * 50 + 1e-9).all()
    torch.testing.assert_close(true_residuals(matrix, pairs), pairs.residuals, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    arpack = eigsh(matrix.numpy(), k=4, which="LA" if which == "largest" else "LM")[0]
    torch.testing.assert_close(pairs.values.sort().values, torch.tensor(sorted(arpack)), rtol=1e-3, atol=0)


def test_single_precision_stays_orthogonal():
    matrix = symmetric(DEFINITE)
    pairs = lanczos(times(matrix), 200, count=100, max_iterations=100)
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(100), rtol=0, atol=1e-5)
    torch.testing.assert_close(pairs.values[:4].float(), torch.tensor(DEFINITE[:4]), rtol=1e-4, atol=0)


def test_a_whole_spectrum():
    eigenvalues = [3.0, 2.0, 1.0, 0.5, 0.0, -2.5]
    pairs = lanczos(times(symmetric(eigenvalues)), 6, which="largest", like=DOUBLE)
    assert pairs.status == "converged" and pairs.num_products == 6
    torch.testing.assert_close(pairs.values, torch.tensor(eigenvalues, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("starts", [1, 2])
def test_repeated_eigenvalues_take_as_many_starts(starts):
    """Of an eigenvalue that occurs twice, one start sees one copy."""
    matrix = symmetric([9.0, 9.0, 4.0, 4.0, *[0.0] * 16])
    pairs = lanczos(times(matrix), 20, count=10, starts=starts, like=DOUBLE)
    assert pairs.status == "breakdown"
    found = [round(value, 6) for value in pairs.values.tolist() if abs(value) > 1e-6]
    assert found == sorted([9.0, 4.0] * starts, reverse=True)
    assert "exact" in pairs.describe() and "starts" in pairs.describe()
    assert (true_residuals(matrix, pairs) < 1e-8).all()


@pytest.mark.parametrize("count", [1, 200])
def test_a_zero_matrix(count):
    pairs = lanczos(lambda vector: 0 * vector, 50, count=count)
    assert pairs.status in ("converged", "breakdown") and pairs.num_products <= 2
    assert not pairs.values.any() and not pairs.residuals.any() and pairs.largest_residual == 0


def test_no_dimensions():
    pairs = lanczos(lambda vector: vector, 0)
    assert pairs.values.shape == (0,) and pairs.vectors.shape == (0, 0) and pairs.num_products == 0


def test_products_run_out():
    pairs = lanczos(times(symmetric(DEFINITE)), 200, count=20, max_iterations=12)
    assert pairs.status == "not converged" and pairs.num_products == 12 and len(pairs.values) == 12
    assert pairs.largest_residual == (pairs.residuals.max() / pairs.values.abs().max()).item() > 5e-4
    message = pairs.describe()
    assert "not converged after 12 products" in message and f"{pairs.largest_residual:.1e}" in message
    assert "Raise max_iterations or the tolerance" in message


def test_as_many_as_the_iterations_allow():
    """200 pairs asked of 100 iterations, as the paper does."""
    assert len(lanczos(times(symmetric(DEFINITE)), 200).values) == 100


def test_ritz_values_are_curvatures_along_their_vectors():
    """However far from convergence."""
    matrix = symmetric(INDEFINITE)
    pairs = lanczos(times(matrix), 200, count=5, max_iterations=5, like=DOUBLE)
    projected = pairs.vectors.T @ matrix @ pairs.vectors
    torch.testing.assert_close(projected, torch.diag(pairs.values), rtol=0, atol=1e-9)


def test_the_seed_decides():
    matrix = symmetric(DEFINITE)
    first, second, third = (lanczos(times(matrix), 200, max_iterations=5, seed=seed).values for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, third)
