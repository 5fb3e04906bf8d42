"""Eigenpairs at the ends of a symmetric matrix's spectrum from products alone: Lanczos, fully reorthogonalised.

CET Algorithm 1, step 1: from a random vector, products with H build an orthonormal basis V of a Krylov space,
`T = V' H V` is tridiagonal, and the eigenpairs (theta, s) of the small T give those of H: theta and V s. With several
random starts T is banded, one band for each start (Ruhe's band Lanczos); a single start would find a double eigenvalue
only once.

    H V = V T + R,   residual of a pair:  || H V s - theta V s || = || R s ||                (exact, no product spent)

Maintained libraries do not fit. ARPACK (`scipy.sparse.linalg.eigsh`) limits restarts, not products, which are the cost
here; at its limit it drops every pair that has not converged, although a Ritz value is the true curvature along its
vector even far from an eigenvector; it cannot compute all pairs of a small matrix and fails on a zero matrix.
`torch.lobpcg` takes a matrix, not a product, and finds one end only. The tests compare this implementation with a dense
solver and with ARPACK.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Status = Literal["converged", "breakdown", "not converged"]
Which = Literal["largest", "magnitude"]

MAX_ITERATIONS = 100
"""Largest number of products (CET section 4.1)."""

MAX_EIGENPAIRS = 200
"""Number of pairs wanted (CET section 4.2); 100 products give at most 100."""


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs of a symmetric matrix H [n, n].

    Attributes:
        values: Eigenvalues [m], float64 on the CPU, in the requested order.
        vectors: Eigenvectors [n, m], orthonormal.
        residuals: Residuals ||H v - value v|| [m]; each value lies within its residual of an eigenvalue of H.
        num_products: Number of products.
        status: "converged": every requested pair has reached the tolerance, or the basis spans the full space.
            "breakdown": the starts' Krylov space is closed under H: the pairs are exact, but fewer than requested. "not
            converged": the limit of products was reached first.
        scale: Largest |value|, to which the tolerance is relative.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    num_products: int
    status: Status
    scale: float

    @property
    def largest_residual(self) -> float:
        """Returns the largest residual relative to `scale`; 0 where there are no pairs or H is zero."""
        return self.residuals.max().item() / self.scale if self.scale and len(self.residuals) else 0.0

    def describe(self) -> str:
        """Describes the status in words, with the remedy where there is one."""
        if self.status == "converged":
            return f"converged: {len(self.values)} eigenpairs after {self.num_products} products"
        if self.status == "breakdown":
            return (
                f"breakdown after {self.num_products} products: the {len(self.values)} eigenpairs are exact, what is "
                "left of the spectrum is zero or repeats them (raise starts to see repetitions)"
            )
        return (
            f"not converged after {self.num_products} products: residuals up to {self.largest_residual:.1e} of the "
            "largest eigenvalue. Raise max_iterations or the tolerance, or ask for fewer eigenpairs"
        )


def lanczos(
    product: Callable[[Tensor], Tensor],
    dimension: int,
    *,
    count: int = MAX_EIGENPAIRS,
    which: Which = "largest",
    max_iterations: int = MAX_ITERATIONS,
    starts: int = 2,
    tolerance: float = 1e-3,
    seed: int = 0,
    like: Tensor | None = None,
) -> Eigenpairs:
    """Computes eigenpairs of a symmetric matrix that is given by its products.

    Args:
        product: Computes H v [n] for v [n].
        dimension: n.
        count: Number of pairs; fewer are returned where the products do not suffice.
        which: "largest" eigenvalues first, or by "magnitude", including negative ones.
        max_iterations: Largest number of products; convergence is tested after 2 count of them. The basis takes
            (max_iterations + starts) n numbers.
        starts: Number of random starting vectors; eigenvalues of up to this multiplicity are found with it.
        tolerance: Residual at which a pair has converged, relative to the largest |value|.
        seed: Seed of the starts, which are drawn on the CPU.
        like: A tensor of the dtype and device to compute in; None: float32 on the CPU.

    Example:
        >>> diagonal = torch.arange(1.0, 101.0)
        >>> pairs = lanczos(lambda v: diagonal * v, 100, count=2)
        >>> [round(value) for value in pairs.values.tolist()], pairs.status
        ([100, 99], 'converged')
    """
    like = torch.empty(0) if like is None else like
    max_products = min(max_iterations, dimension)
    basis = torch.empty(min(max_products + starts, dimension), dimension, dtype=like.dtype, device=like.device)
    couplings = torch.zeros(max_products + starts, max_products, dtype=torch.float64)  # basis' H basis
    negligible = 100 * torch.finfo(like.dtype).eps
    generator = torch.Generator().manual_seed(seed)
    size = num_products = 0
    largest_image = 0.0

    for _ in range(min(starts, dimension)):
        start = torch.randn(dimension, generator=generator, dtype=torch.float64).to(like)
        rest, _ = _orthogonalise(start / start.norm(), basis[:size])
        basis[size] = rest / rest.norm()
        size += 1

    status: Status = "not converged" if dimension else "converged"
    values, coordinates, residuals = _ritz_pairs(couplings, 0, 0)
    while num_products < min(size, max_products):
        image = product(basis[num_products]).to(like)
        largest_image = max(largest_image, image.norm().item())
        rest, overlaps = _orthogonalise(image, basis[:size])
        couplings[:size, num_products] = overlaps.double().cpu()
        norm = rest.norm().item()
        if size < len(basis) and norm > negligible * largest_image:
            basis[size] = rest / norm
            couplings[size, num_products] = norm
            size += 1
        num_products += 1
        values, coordinates, residuals = _ritz_pairs(couplings, num_products, size)
        wanted = _order(values, which)[:count]
        reached = residuals[wanted] <= tolerance * values.abs().max()
        # Twice the count: the first pairs may be stable before the leading ones have appeared.
        if (num_products >= 2 * count and bool(reached.all())) or num_products == dimension:
            status = "converged"
            break
        if num_products == size:
            status = "breakdown"

    wanted = _order(values, which)[:count]
    vectors = basis[:num_products].T @ coordinates[:, wanted].to(like)
    scale = values.abs().max().item() if num_products else 0.0
    return Eigenpairs(values[wanted], vectors, residuals[wanted], num_products, status, scale)


def _orthogonalise(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the part of a vector [n] outside of the basis [k, n], and its coordinates [k] in it.

    Orthogonalising twice is enough (Kahan).
    """
    overlaps = basis @ vector
    rest = vector - overlaps @ basis
    correction = basis @ rest
    return rest - correction @ basis, overlaps + correction


def _ritz_pairs(couplings: Tensor, num_products: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes eigenvalues [p] of T, their coordinates [p, p] and residuals [p].

    T comes from p products and `size` basis vectors.
    """
    projected = couplings[:num_products, :num_products]
    values, coordinates = torch.linalg.eigh((projected + projected.T) / 2)
    return values, coordinates, (couplings[num_products:size, :num_products] @ coordinates).norm(dim=0)


def _order(values: Tensor, which: Which) -> Tensor:
    return (values if which == "largest" else values.abs()).argsort(descending=True, stable=True)
