"""The inverse roots of a layer's metric `tr(R d C d')`, of its rows and of its columns, for error feedback.

For the damped factor H of rows or of columns, the root U of its inverse satisfies `H^-1 = U' U`, with U upper
triangular in the order of falling H_ii. Normalised errors E of independent entries make the weight error `d = V' E U`
(V: the root of the rows), so that `tr(R d C d') = ||E||^2`: every entry of E costs the same.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors, damping_term
from hf_lossless.candidates.feedback import Metric
from hf_lossless.storage.plan import Damping


@dataclass(frozen=True)
class InverseRoot:
    """The inverse root of one factor of the metric, of its rows or of its columns.

    Attributes:
        order: Indices by falling H_ii, [n].
        root: U in that order, [n, n]; for a diagonal factor the diagonal of U, [n].
    """

    order: Tensor
    root: Tensor

    @classmethod
    def of(cls, factor: Tensor, damping: float) -> "InverseRoot":
        """Computes the inverse root of a damped factor [n, n], or of a diagonal one [n].

        Args:
            factor: Second moments; where they are all zero, the root is the identity.
            damping: Share of the mean diagonal that is added to it.
        """
        if factor.ndim == 1:
            diagonal = factor.float()
            return cls(torch.arange(len(factor)), (diagonal + damping_term(diagonal[None], damping)[0]).rsqrt())
        metric = Metric.of(factor[None], damping)
        return cls(metric.order[0], metric.root[0])

    @property
    def is_diagonal(self) -> bool:
        """Tells whether the factor is diagonal, so that its entries are rounded independently."""
        return self.root.ndim == 1

    @property
    def unit_steps(self) -> Tensor:
        """Returns U_ii in the original order, [n]: the steps whose rounding costs 1."""
        return self._unordered(self.root if self.is_diagonal else self.root.diagonal())

    def feedback_variance(self, shares: Tensor) -> Tensor:
        """Computes the variance that feedback adds to entry i: `sum_{j before i} U_ji^2 shares_j`, [n].

        It is in the original order.

        Args:
            shares: Variance of each entry's normalised error, [n].
        """
        if self.is_diagonal:
            return torch.zeros_like(shares)
        return self._unordered(shares[self.order] @ self._shares_of_earlier)

    @functools.cached_property
    def _shares_of_earlier(self) -> Tensor:
        return self.root.square().fill_diagonal_(0)

    def charges(self, judge: Tensor) -> Tensor:
        """Computes `(U J U')_ii` in the original order, [n]: the cost of a unit error by another factor J.

        Args:
            judge: J, [n, n] or a diagonal [n].
        """
        if self.is_diagonal:
            diagonal = judge if judge.ndim == 1 else judge.diagonal()
            return self.root.square() * diagonal
        assert judge.ndim == 2
        ordered = judge.index_select(0, self.order).index_select(1, self.order)
        return self._unordered(((self.root @ ordered) * self.root).sum(1))

    def _unordered(self, values: Tensor) -> Tensor:
        return torch.empty_like(values).index_copy_(0, self.order.to(values.device), values)


@dataclass(frozen=True)
class InverseRoots:
    """The inverse roots of both factors of a layer's metric, and its scale.

    Attributes:
        rows: Inverse root V of R.
        columns: Inverse root U of C.
        scale: The curvature's scale.
    """

    rows: InverseRoot
    columns: InverseRoot
    scale: float

    @classmethod
    def of(cls, curvature: KroneckerFactors, damping: Damping) -> "InverseRoots":
        """Computes the inverse roots of a layer's damped curvature.

        Args:
            curvature: Kronecker factors of the layer.
            damping: Shares of the mean diagonals that are added to the factors.
        """
        rows, columns = InverseRoot.of(curvature.rows, damping.rows), InverseRoot.of(curvature.columns, damping.columns)
        return cls(rows, columns, curvature.scale)

    def row_steps(self, step: float) -> Tensor:
        """Computes `step V_kk / sqrt(scale)`, [out].

        With `column_steps`, every weight's rounding costs `step^2 / 24` nats.
        """
        return self.rows.unit_steps * (step / math.sqrt(self.scale))

    @property
    def column_steps(self) -> Tensor:
        """Returns `U_ii`, [in]."""
        return self.columns.unit_steps
