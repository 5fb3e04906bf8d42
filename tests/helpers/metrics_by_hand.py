"""Kronecker-factored metrics of every kind for the tests of what is rounded in them."""

import torch
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.storage.plan import Damping

DAMPING = Damping(rows=0.3, columns=0.1)


def second_moments(size: int, seed: int, decay: float = 1.0) -> Tensor:
    """Of correlated numbers with a power law of eigenvalues, the mean of its diagonal one, [size, size]."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    moments = (basis * torch.arange(1, size + 1) ** -decay) @ basis.T
    return moments / moments.diagonal().mean()


def curvature_of(out: int, into: int, seed: int = 0, scale: float = 0.5, diagonal: str = "") -> KroneckerFactors:
    """Factors of a layer [out, into]; those of the sides in `diagonal` ("rows", "columns") are diagonal."""
    rows, columns = second_moments(out, seed), second_moments(into, seed + 1000)
    rows = rows.diagonal().clone() if "rows" in diagonal else rows
    return KroneckerFactors(rows, columns.diagonal().clone() if "columns" in diagonal else columns, scale)


def dense(factor: Tensor, damping: float) -> Tensor:
    """A damped factor as a matrix in float64."""
    full = (factor.diag() if factor.ndim == 1 else factor).double()
    mean = full.diagonal().mean()
    return full + (damping * mean if mean else 1.0) * torch.eye(len(full), dtype=torch.float64)


def upper_root(matrix: Tensor) -> Tensor:
    """U with `H^-1 = U' U`, upper triangular."""
    return torch.linalg.cholesky(torch.linalg.inv(matrix)).mT
