"""The rate-distortion bound of the quadratic model: the least bytes for a predicted loss.

In the eigenbases of R (eigenvalues gamma_k) and C (lambda_i) the second-order term `1/2 scale tr(R d C d')` of a layer
is a sum over independent components. Setting the component (k, i) of W to zero costs

    s_ki = 1/2 scale gamma_k lambda_i sigma^2                  nats, with sigma^2 the layer's mean square weight

and at the water level theta, one for the whole model, reverse water-filling (Shannon; Cover & Thomas 2006, Thm 10.3.3)
gives the loss D and the bits

    D(theta) = sum min(theta, s_ki),      rate(theta) = sum max(0, 1/2 log2(s_ki / theta)).

It is a bound in this sense: no code, of any length and complexity, stores independent normal weights of variance
sigma^2 in every direction in fewer bits at that loss. Normal weights need the most bits for their variance, so that the
limit for real weights is at most this, and a plan may lie below it where a layer's weights have heavy tails or lie in
few directions. The bytes of the eigenbases are not counted.

The curvature is that of the calibration rows. Undamped, a direction without variance on these rows takes no bits: the
bound is for the loss on the rows that a plan was fitted to, and predictions on other rows and the held-out loss need
more bits. Damped as for shaped grids, it is the bound for the objective of their rounding, and shows the loss between
that objective and the bytes: at high rate, whole numbers coded at their entropy take 1/2 log2(pi e / 6), or 0.25 bits,
more than the bound for every weight (Gish & Pierce 1968).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.calibration.statistics import LayerStatistics
from hf_lossless.storage.layers import Layer, LayerKind
from hf_lossless.storage.plan import Damping
from hf_lossless.theories.problem import Problem

_FINEST_BITS = 10
"""Bits of a layer's mean component at the finest default level, on average over layers."""

_LEVELS_PER_BIT = 4


@dataclass(frozen=True)
class Signals:
    """The cost of zeroing each component of a layer, `s_ki = rows_k columns_i`, in float64.

    Attributes:
        rows: Factors 1/2 scale sigma^2 gamma_k, [out].
        columns: Factors lambda_i, [in], ascending.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, matrix: Tensor, curvature: KroneckerFactors, damping: Damping | None = None) -> "Signals":
        """Computes the signals of a layer's matrix [out, in].

        Args:
            matrix: W [out, in].
            curvature: Kronecker factors of the layer.
            damping: Shares of the mean diagonals that are added to the factors; None: undamped.
        """
        mean_square = matrix.detach().square().mean(dtype=torch.float64).item()
        row_share, column_share = (0.0, 0.0) if damping is None else (damping.rows, damping.columns)
        rows = _damped(eigenvalues(curvature.rows), row_share) * (0.5 * curvature.scale * mean_square)
        return cls(rows, _damped(eigenvalues(curvature.columns), column_share).sort().values)

    @property
    def largest(self) -> float:
        """Returns the largest s_ki."""
        return (self.rows.max() * self.columns.max()).item()

    def at_levels(self, thetas: Tensor) -> tuple[Tensor, Tensor]:
        """Computes bits and loss at each water level, both [levels].

        Columns are sorted, so that the components above the water level are the last ones of each row: with cumulative
        sums a level takes out log(in) steps for its out in components.

        Args:
            thetas: Water levels [levels], float64, positive.
        """
        columns = self.columns
        rows = self.rows[self.rows > 0]
        logs = columns.clamp(min=torch.finfo(columns.dtype).tiny).log2()
        sums, log_sums = (torch.cat([one.new_zeros(1), one.cumsum(0)]) for one in (columns, logs))
        bits, losses = [], []
        for theta in thetas:
            first = torch.searchsorted(
                columns, theta / rows, right=True
            )  # the first column above the water level, for each row
            above = len(columns) - first
            bits.append(0.5 * ((rows / theta).log2() * above + log_sums[-1] - log_sums[first]).sum())
            losses.append((theta * above + rows * sums[first]).sum())
        return torch.stack(bits), torch.stack(losses)


def rate_distortion(
    problem: Problem,
    other_bytes: int,
    thetas: Sequence[float] | None = None,
    damping: Callable[[LayerKind], Damping | None] = lambda kind: None,
) -> list[tuple[float, float]]:
    """Computes the bound for a model: pairs of bytes and predicted rise of the mean loss, in nats.

    Args:
        problem: The problem, with curvature in its statistics.
        other_bytes: Bytes of all other tensors than layers' weights; they are added unchanged.
        thetas: Water levels, in nats for each component; None: a quarter of a bit apart, from the coarsest, where all
            weights are zero.
        damping: Damping of the curvature for a kind of layer; None: undamped.

    Returns:
        `(other_bytes + rate / 8, D)` for each level, in their order. A layer that no gradient reaches is counted with
        its original bytes and no loss.

    Example:
        For a white spectrum it is D = out in s 4^(-bits per weight).

        >>> from hf_lossless.theories.rate_distortion import Signals
        >>> white = Signals(torch.full((2,), 0.5).double(), torch.ones(3).double())
        >>> bits, loss = white.at_levels(torch.tensor([0.5 / 16]).double())
        >>> bits.item() / 6, loss.item() == 6 * 0.5 / 4**2
        (2.0, True)
    """
    signals, num_bytes = [], float(other_bytes)
    for layer in problem.layers:
        curvature = _curvature_of(layer, problem.calibration.layers[layer.name])
        if curvature is None:
            num_bytes += layer.weight.nbytes
        else:
            signals.append(Signals.of(layer.matrix, curvature, damping(layer.kind)))
    if not signals:
        return [(num_bytes, 0.0)]
    levels = torch.tensor(_usual_levels(signals) if thetas is None else thetas, dtype=torch.float64)
    found = [one.at_levels(levels) for one in signals]
    rate, loss = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
    return list(zip((num_bytes + rate / 8).tolist(), loss.tolist(), strict=True))


def eigenvalues(factor: Tensor) -> Tensor:
    """Computes the eigenvalues of a factor [n, n], or of a diagonal one [n]; float64, rounding errors set to 0.

    Args:
        factor: Positive semi-definite factor [n, n], or its diagonal [n].

    Returns:
        The eigenvalues [n], float64.
    """
    if factor.ndim == 1:
        return factor.double().clamp(min=0)
    found = torch.linalg.eigvalsh(factor.double().cpu())
    noise = len(found) * torch.finfo(factor.dtype).eps * found[-1]
    return torch.where(found > noise, found, 0.0)


def _damped(values: Tensor, share: float) -> Tensor:
    """Adds `share` of the mean diagonal of a factor to its eigenvalues."""
    return values + share * values.mean()


def _curvature_of(layer: Layer, statistics: LayerStatistics) -> KroneckerFactors | None:
    """Returns the curvature of a layer; None where the loss does not depend on it."""
    assert statistics.curvature is not None, f"no curvature of {layer.name}"
    return statistics.curvature if statistics.has_derivatives else None


def _usual_levels(signals: list[Signals]) -> list[float]:
    """Lists levels from the strongest component down to where a layer's mean component takes `_FINEST_BITS`."""
    largest = max(one.largest for one in signals)
    mean = sum((one.rows.mean() * one.columns.mean()).item() for one in signals) / len(signals)
    levels = [largest]
    while levels[-1] > mean * 4**-_FINEST_BITS:
        levels.append(levels[-1] * 4 ** (-1 / _LEVELS_PER_BIT))
    return levels
