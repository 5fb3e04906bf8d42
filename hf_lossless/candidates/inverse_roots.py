"""The two sides of a layer's metric, `tr(R d C d')`: what feedback needs to know of the rows and of the columns.

A side is the damped factor H of its rows or columns and the root U of its inverse, `H^-1 = U' U`, U upper triangular in
an order of falling H_ii. Normalised errors E of independent entries make the weight error `d = V' E U` (V: the root of
the rows), so that `tr(R d C d') = ||E||^2`: every entry of E costs the same.
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
    """One side of the metric.

    Attributes:
        order: By falling H_ii, [n].
        root: U in that order, [n, n]; of a diagonal factor the diagonal of U, [n].
    """

    order: Tensor
    root: Tensor

    @classmethod
    def of(cls, factor: Tensor, damping: float) -> "InverseRoot":
        """The side of a factor [n, n], or of a diagonal one [n].

        Args:
            factor: Second moments; where they are all zero, the side is the identity.
            damping: Share of the mean diagonal that is added to it.
        """
        if factor.ndim == 1:
            diagonal = factor.float()
            return cls(torch.arange(len(factor)), (diagonal + damping_term(diagonal[None], damping)[0]).rsqrt())
        metric = Metric.of(factor[None], damping)
        return cls(metric.order[0], metric.root[0])

    @property
    def is_diagonal(self) -> bool:
        """Whether no entry has a say in another's."""
        return self.root.ndim == 1

    @property
    def unit_steps(self) -> Tensor:
        """U_ii in the original order, [n]: the step that costs 1."""
        return self._unordered(self.root if self.is_diagonal else self.root.diagonal())

    def carried(self, shares: Tensor) -> Tensor:
        """`sum_{j before i} U_ji^2 shares_j` in the original order, [n]: the variance that feedback brings to entry i.

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
        """`(U J U')_ii` in the original order, [n]: what a unit of each normalised error costs by another factor J.

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
    """Both sides of a layer's metric, and its scale.

    Attributes:
        rows: InverseRoot of R; its root is V.
        columns: InverseRoot of C; its root is U.
        scale: The curvature's scale.
    """

    rows: InverseRoot
    columns: InverseRoot
    scale: float

    @classmethod
    def of(cls, curvature: KroneckerFactors, damping: Damping) -> "InverseRoots":
        """The sides of a layer's curvature."""
        rows, columns = InverseRoot.of(curvature.rows, damping.rows), InverseRoot.of(curvature.columns, damping.columns)
        return cls(rows, columns, curvature.scale)

    def row_steps(self, step: float) -> Tensor:
        """`step V_kk / sqrt(scale)`, [out]: with `column_steps`, every weight's rounding costs `step^2 / 24` nats."""
        return self.rows.unit_steps * (step / math.sqrt(self.scale))

    @property
    def column_steps(self) -> Tensor:
        """`U_ii`, [in]."""
        return self.columns.unit_steps
