"""The ends of a symmetric matrix's spectrum from products alone: Lanczos with full reorthogonalisation.

CET Algorithm 1, step 1: from a random vector, products with H build an orthonormal basis V of a Krylov space,
`T = V' H V` is tridiagonal, and the eigenpairs (theta, s) of the small T give those of H: theta and V s. With several
random starts T is banded, one band for each start (Ruhe's band Lanczos); a single start would see an eigenvalue that
occurs twice only once.

    H V = V T + R,   residual of a pair:  || H V s - theta V s || = || R s ||                (exact, no product spent)

Why not a kept library. ARPACK (`scipy.sparse.linalg.eigsh`) counts restarts, not products, and it is products that
cost here; when they run out it throws away every pair that has not converged, though a Ritz value is the true
curvature along its vector however far the vector still is from an eigenvector; it cannot give all pairs of a small
matrix and fails on a zero one. `torch.lobpcg` takes a matrix, not a product, and finds one end only. The price is the
forty lines below; the tests hold them against both a dense solver and ARPACK.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Status = Literal["converged", "breakdown", "not converged"]
Which = Literal["largest", "magnitude"]

MAX_ITERATIONS = 100
"""Products at most (CET section 4.1)."""

MAX_EIGENPAIRS = 200
"""Pairs asked for (CET section 4.2); 100 products give 100 at most."""


@dataclass(frozen=True)
class Eigenpairs:
    """What was found of a symmetric matrix H [n, n].

    Attributes:
        values: [m], float64 on the CPU, in the order asked for.
        vectors: [n, m], orthonormal.
        residuals: [m] of ||H v - value v||; each value lies within its residual of an eigenvalue of H.
        num_products: Products spent.
        status: "converged": every pair asked for has reached the tolerance, or the whole space is spanned.
            "breakdown": the starts' Krylov space is closed under H: the pairs are exact, though fewer than asked.
            "not converged": the products were spent before.
        scale: Largest |value| seen, what the tolerance is relative to.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    num_products: int
    status: Status
    scale: float

    @property
    def largest_residual(self) -> float:
        """Largest residual relative to `scale`; 0 where there is nothing to find."""
        return self.residuals.max().item() / self.scale if self.scale and len(self.residuals) else 0.0

    def describe(self) -> str:
        """The status in words, with the remedy where there is one."""
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
    """Eigenpairs of a symmetric matrix of which only products are known.

    Args:
        product: v [n] -> H v [n].
        dimension: n.
        count: Pairs asked for; as many as the products allow are given.
        which: "largest" first, or by "magnitude", negative ones among them.
        max_iterations: Products at most; convergence is believed after 2 count of them. The basis takes
            (max_iterations + starts) n numbers.
        starts: Random starting vectors; eigenvalues that occur up to so often are found as often.
        tolerance: Residual at which a pair has converged, relative to the largest |value|.
        seed: Of the starts, drawn on the CPU.
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
        # As many products again: the first so many pairs of all may be steady before the leading ones have come up.
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
    """What of a vector [n] lies outside the basis [k, n], and its coordinates [k] in it. Twice is enough (Kahan)."""
    overlaps = basis @ vector
    rest = vector - overlaps @ basis
    correction = basis @ rest
    return rest - correction @ basis, overlaps + correction


def _ritz_pairs(couplings: Tensor, num_products: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [p] of T, their coordinates [p, p] and residuals [p], from p products and `size` basis vectors."""
    projected = couplings[:num_products, :num_products]
    values, coordinates = torch.linalg.eigh((projected + projected.T) / 2)
    return values, coordinates, (couplings[num_products:size, :num_products] @ coordinates).norm(dim=0)


def _order(values: Tensor, which: Which) -> Tensor:
    return (values if which == "largest" else values.abs()).argsort(descending=True, stable=True)
