"""Factorisations `W [out, in] ~ L [out, r] @ R [r, in]`: truncated SVDs, plain or in the metric of the loss.

In the Kronecker-factored metric of a layer (see `calibration.curvature`), an error d of the weight costs

    tr(M_rows d M_columns d') = || C_rows' d C_columns ||_F^2,      M = C C' (Cholesky),

so that by Eckart and Young the best matrix of rank r is the truncated SVD of `C_rows' W C_columns`, transformed back:

    C_rows' W C_columns = U S V',      L = C_rows^-T U_r D^-1,      R = D S_r V_r' C_columns^-1,

with a diagonal D that gives the columns of L the root mean square 1.

Any square root gives the same optimum; Cholesky factors are an order of magnitude cheaper than symmetric roots, and
are undone by triangular solves. Identity metrics give the plain SVD (LLC section 4); a diagonal metric of the columns
gives FWSVD (Hsu et al., "Language model compression with weighted low-rank factorization", 2022); full metrics give the
generalised Fisher-weighted SVD of Chekalina et al. (2025).
"""

import logging
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.candidates.cholesky import cholesky
from hf_lossless.candidates.damping import RANKS

WIDE = 2048
"""Where the shorter dimension is above this, only the leading singular vectors are computed, by a randomised SVD."""

LARGEST_EXCESS = 1e-2
"""Largest excess of a randomised SVD's error over that of the best matrix of its rank, as a share of the squared
norm."""

OVERSAMPLING = 16
"""Components of a randomised SVD beyond the requested ones, which make the last of these accurate."""

_RANDOM_STATE = Lock()

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factors:
    """The two factors of a low-rank matrix.

    Attributes:
        left: L [out, rank], float32.
        right: R [rank, in], float32.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Returns the rank: the number of columns of L."""
        return self.left.shape[1]


@dataclass(frozen=True)
class Factorisation:
    """The SVD of a matrix in some metric; every truncation of it is a pair of views.

    Attributes:
        factors: L and R of the largest rank computed, sorted by singular value.
        singular_values: Singular values of `C_rows' W C_columns`, float64, as many as that rank.
        excess: Upper bound of a truncation's excess error over that of the best matrix of its rank, as a share of the
            squared norm in the metric; 0 where the SVD is not randomised.
    """

    factors: Factors
    singular_values: Tensor
    excess: float

    def truncated(self, rank: int) -> Factors:
        """Returns the factors of rank `rank`, as views."""
        return Factors(self.factors.left[:, :rank], self.factors.right[:rank])


@dataclass(frozen=True)
class Whitening:
    """Square roots of a metric, which transform a matrix before an SVD and back after it.

    Attributes:
        rows: C_rows, lower triangular [out, out] or a diagonal [out], float64.
        columns: C_columns, lower triangular [in, in] or a diagonal [in], float64.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, curvature: KroneckerFactors, damping: float = RANKS) -> "Whitening":
        """Computes the roots of a layer's damped curvature: `M = C C'`.

        Args:
            curvature: Kronecker factors of the layer.
            damping: Share of the mean diagonal that is added to each factor.
        """
        damped = curvature.damped(damping)
        return cls(_root(damped.rows), _root(damped.columns))


def factorise(matrix: Tensor, whitening: Whitening | None = None, *, largest: int | None = None) -> Factorisation:
    """Computes the SVD of a matrix in a metric.

    Args:
        matrix: W [out, in], finite.
        whitening: Roots of the metric; None: the identity.
        largest: The largest rank that will be used; None: any.

    Returns:
        The factorisation; `truncated(r)` minimises `tr(M_rows d M_columns d')` over all matrices of rank r, to within
        `excess` of the squared norm.

    Example:
        >>> matrix = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> factors = factorise(matrix).truncated(1)
        >>> (factors.left @ factors.right).round(decimals=4)
        tensor([[4., 0.],
                [0., 0.]])
    """
    weighted = matrix.detach().double()
    if whitening is not None:
        weighted = _transposed_times(whitening.columns, _transposed_times(whitening.rows, weighted).mT).mT
    U, S, Vt, excess = _svd(weighted, largest)
    left, right = U, S[:, None] * Vt
    if whitening is not None:
        left = _transposed_solve(whitening.rows, left)
        right = _transposed_solve(whitening.columns, right.mT).mT
    # A grid's groups run along rows: in R within one component, in L across components, which so need equal sizes.
    sizes = left.square().mean(0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return Factorisation(Factors((left / sizes).float(), (right * sizes[:, None]).float()), S, excess)


def _svd(matrix: Tensor, largest: int | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """Computes U, S, V' and the excess; of a wide matrix only the leading triplets, where few are needed."""
    shorter = min(matrix.shape)
    if largest is not None and shorter > WIDE and 4 * largest < shorter:
        U, S, V = _randomised(matrix, min(largest + OVERSAMPLING, shorter))
        excess = excess_bound(matrix, S)
        _logger.info(
            "randomised SVD of a %d x %d matrix to rank %d: at most %.2g of its squared norm above the best, %s",
            *matrix.shape,
            largest,
            excess,
            "taken" if excess <= LARGEST_EXCESS else "too much, so a full one follows",
        )
        if excess <= LARGEST_EXCESS:
            return U[:, :largest], S[:largest], V[:, :largest].mT, excess
    U, S, Vt = (
        _svd_of_long(matrix) if max(matrix.shape) >= 2 * shorter else torch.linalg.svd(matrix, full_matrices=False)
    )
    kept = shorter if largest is None else min(largest, shorter)
    return U[:, :kept], S[:kept], Vt[:kept], 0.0


def _svd_of_long(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the SVD from the eigenvectors of the shorter dimension's Gram matrix, several times as fast.

    In float64 singular values below 1e-8 of the largest are lost in rounding, as they are in the float32 of weights;
    the truncated products are projections, `W V_r V_r'`, and do not suffer from it.
    """
    if matrix.shape[0] < matrix.shape[1]:
        U, S, Vt = _svd_of_long(matrix.mT)
        return Vt.mT, S, U.mT
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    S = squares.clamp(min=0).sqrt().flip(0)
    V = vectors.flip(1)
    U = matrix @ V / torch.where(S > 0, S, 1.0)
    return U, S, V.mT


def _randomised(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a randomised SVD (Halko et al. 2011) with torch, and restores its global random state.

    One thread at a time may change that state.
    """
    devices = [matrix.device] if matrix.is_cuda else []
    with _RANDOM_STATE, torch.random.fork_rng(devices):
        torch.manual_seed(0)
        found: tuple[Tensor, Tensor, Tensor] = torch.svd_lowrank(matrix, rank, niter=4)
    return found


def excess_bound(matrix: Tensor, singular_values: Tensor) -> float:
    """Bounds the excess error of truncating a randomised SVD, over ||W||_F^2.

    With Q the orthonormal basis of the randomised SVD, `||W||^2 = ||Q Q' W||^2 + ||E||^2` and the computed S are those
    of `Q Q' W`. The r largest squared singular values of W sum to at most those of `Q Q' W` plus `||E||_F^2` (Ky Fan),
    so the excess of any truncation is at most `||E||_F^2 = ||W||_F^2 - sum S^2`.

    Args:
        matrix: W.
        singular_values: All singular values that were computed.
    """
    total = matrix.square().sum()
    if total == 0:
        return 0.0
    return float((1 - singular_values.square().sum() / total).clamp(min=0))


def _root(metric: Tensor) -> Tensor:
    """Computes C with `C C' = M`: lower triangular [n, n], or a diagonal [n]; float64."""
    if metric.ndim == 1:
        return metric.double().sqrt()
    return cholesky(metric.double())


def _transposed_times(root: Tensor, matrix: Tensor) -> Tensor:
    """Computes `C' B`."""
    return root[:, None] * matrix if root.ndim == 1 else root.mT @ matrix


def _transposed_solve(root: Tensor, matrix: Tensor) -> Tensor:
    """Computes `C^-T B`."""
    return matrix / root[:, None] if root.ndim == 1 else torch.linalg.solve_triangular(root.mT, matrix, upper=True)
