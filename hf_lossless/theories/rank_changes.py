"""Predicts the cost of truncating a matrix to a rank, judged on other rows than those it was fitted to.

The SVD in the metric of the calibration rows drops the directions with the least variance on these rows. Judged on the
same rows its cost is underestimated, more so with fewer rows: on MiniLM, with 128 rows at a ratio of 8, the plan chosen
this way had a predicted cost of 0.008 nats and a cost of 0.026 +- 0.007 on other rows. So the truncation is fitted to
one half of the calibration batches and judged by the curvature of the other half (see `cross_fit`; the prediction is
then 0.011, and the cost on other rows 0.020 +- 0.007).

With the components `W = sum_k l_k r_k' + E` of the SVD (E: the remainder of a partial SVD), the error of rank r is `d =
-(sum_{k>r} l_k r_k' + E)`, and for every r at once

    tr(M_rows d M_columns d') = sum_{k,j>r} P_kj + 2 sum_{k>r} q_k + tr(M_rows E M_columns E'),
    P = (L' M_rows L) o (R M_columns R'),      q_k = l_k' M_rows E M_columns r_k.
"""

import functools

import torch
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors, second_order_change
from hf_lossless.calibration.statistics import LayerStatistics
from hf_lossless.candidates.low_rank import WIDE, Factors, Whitening, factorise
from hf_lossless.candidates.uniform import on_grid
from hf_lossless.storage.plan import LowRank
from hf_lossless.theories.cross_fit import folds


class RankChanges:
    """Predicts the change of the loss for every rank, from both halves of a layer's calibration batches.

    With only one batch there are no halves, and the truncation is judged by the rows that it was fitted to.
    """

    def __init__(self, statistics: LayerStatistics) -> None:
        """Stores a layer's statistics, with curvature; the roots serve the matrix and the remainders of its grids."""
        self.statistics = statistics

    @functools.cached_property
    def _folds(self) -> list[tuple[Whitening, KroneckerFactors]]:
        """Computes the roots to fit with, and the curvature to judge by."""
        return [(Whitening.of(fit), judge) for fit, judge in folds(self.statistics)]

    def changes(self, matrix: Tensor, largest: int) -> Tensor:
        """Predicts the change at rank 0, 1, ... `largest`: [largest + 1], float64.

        Args:
            matrix: Matrix to truncate, [out, in].
            largest: The largest rank.
        """
        return torch.stack([changes_of_ranks(matrix, fit, judge, largest) for fit, judge in self._folds]).mean(0)


def changes_of_ranks(matrix: Tensor, fit: Whitening, judge: KroneckerFactors, largest: int) -> Tensor:
    """Computes `1/2 scale tr(M_rows d M_columns d')` of every rank, in another metric than the SVD's.

    The result has shape [largest + 1].

    Args:
        matrix: [out, in].
        fit: Roots of the metric of the SVD.
        judge: The curvature that gives scale and metric.
        largest: The largest rank.
    """
    wide = min(matrix.shape) > WIDE
    factorisation = factorise(matrix, fit, largest=max(largest, 1) if wide else None)
    left, right = factorisation.factors.left, factorisation.factors.right
    pairs = _inner(left.mT, judge.rows) * _inner(right, judge.columns)
    zero = pairs.new_zeros(1)
    tails = torch.cat([pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0), zero])
    if wide:
        remainder = matrix.detach().float() - left @ right
        weighed = _times(_times(remainder.mT, judge.rows).mT, judge.columns)  # M_rows E M_columns
        crossed = ((left.mT @ weighed) * right).sum(1, dtype=torch.float64)
        tails += 2 * torch.cat([crossed.flip(0).cumsum(0).flip(0), zero])
        tails += (remainder * weighed).sum(dtype=torch.float64)
    return 0.5 * judge.scale * tails[: largest + 1]


def rounding_change(factors: Factors, low_rank: LowRank, curvature: KroneckerFactors) -> float:
    """Predicts the change of the loss caused by putting factors on their grids.

    The errors dL and dR are taken to be uncorrelated with each other and with the error of the rank, so that their
    costs add:

        1/2 scale [ tr(M_rows dL (R M_columns R') dL') + tr((L' M_rows L) dR M_columns dR') ]

    Args:
        factors: L and R before they are rounded.
        low_rank: Grids of the factors.
        curvature: Curvature of the layer.
    """
    change = 0.0
    if low_rank.left is not None:
        error = on_grid(factors.left, low_rank.left) - factors.left
        inner = _inner(factors.right, curvature.columns).float()
        change += second_order_change(error, KroneckerFactors(curvature.rows, inner, curvature.scale))
    if low_rank.right is not None:
        error = on_grid(factors.right, low_rank.right) - factors.right
        inner = _inner(factors.left.mT, curvature.rows).float()
        change += second_order_change(error, KroneckerFactors(inner, curvature.columns, curvature.scale))
    return change


def _inner(vectors: Tensor, metric: Tensor) -> Tensor:
    """Computes `V M V'` of the rows of V, float64."""
    return _times(vectors, metric).double() @ vectors.mT.double()


def _times(vectors: Tensor, metric: Tensor) -> Tensor:
    """Computes `V M`, for a full or diagonal M."""
    return vectors * metric if metric.ndim == 1 else vectors @ metric
