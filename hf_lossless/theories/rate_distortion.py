"""The rate-distortion bound of the quadratic model: how few bytes a predicted loss can take.

In the eigenbases of R (eigenvalues gamma_k) and C (lambda_i) the second-order term `1/2 scale tr(R d C d')` of a layer
is a sum over components that do not mix. Forgetting the component (k, i) of W altogether costs

    s_ki = 1/2 scale gamma_k lambda_i sigma^2                  nats, with sigma^2 the layer's mean square weight

and at the water level theta, one for the whole model, reverse water-filling (Shannon; Cover & Thomas 2006, Thm 10.3.3)
leaves the loss D and takes the bits

    D(theta) = sum min(theta, s_ki),      rate(theta) = sum max(0, 1/2 log2(s_ki / theta)).

In which sense it is a bound: no code, of whatever length and complexity, stores weights that are independent and
normal, of variance sigma^2 in every direction, in fewer bits at that loss. Normal weights are the hardest of their
variance, so for the real ones the limit is at most this, and a plan may lie below it where a layer's weights have heavy
tails or lie in few directions. The decoder is taken to know the eigenbases for nothing.

The curvature is that of the calibration rows. Undamped, a direction that they do not excite takes no bits: the bound is
that of the loss which the rows that a plan was fitted to say of it; a prediction made on other rows, and the held-out
loss, ask for more. Damped as shaped grids are, it is the bound of what their rounding minimises, and says how much is
lost between that metric and the bytes: at high rate, whole numbers coded at their entropy take 1/2 log2(pi e / 6), or
0.25 bits, more than the bound for every weight (Gish & Pierce 1968).
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
"""Bits of a layer's mean component at the finest of the usual levels, on average over layers."""

_LEVELS_PER_BIT = 4


@dataclass(frozen=True)
class Signals:
    """What it costs to forget each component of a layer, `s_ki = rows_k columns_i`, in float64.

    Attributes:
        rows: 1/2 scale sigma^2 gamma_k, [out].
        columns: lambda_i, [in], rising.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, matrix: Tensor, curvature: KroneckerFactors, damping: Damping | None = None) -> "Signals":
        """Those of a layer's matrix [out, in]."""
        mean_square = matrix.detach().square().mean(dtype=torch.float64).item()
        row_share, column_share = (0.0, 0.0) if damping is None else (damping.rows, damping.columns)
        rows = _damped(eigenvalues(curvature.rows), row_share) * (0.5 * curvature.scale * mean_square)
        return cls(rows, _damped(eigenvalues(curvature.columns), column_share).sort().values)

    @property
    def largest(self) -> float:
        """Of all components."""
        return (self.rows.max() * self.columns.max()).item()

    def at_levels(self, thetas: Tensor) -> tuple[Tensor, Tensor]:
        """Bits and loss at each water level, both [levels].

        Columns are sorted, so that of each row those above the water are the last few: with sums over the first
        columns the whole takes out log(in) steps a level, where there are out in components.

        Args:
            thetas: [levels], float64, positive.
        """
        columns = self.columns
        rows = self.rows[self.rows > 0]
        logs = columns.clamp(min=torch.finfo(columns.dtype).tiny).log2()
        sums, log_sums = (torch.cat([one.new_zeros(1), one.cumsum(0)]) for one in (columns, logs))
        bits, losses = [], []
        for theta in thetas:
            first = torch.searchsorted(columns, theta / rows, right=True)  # of each row the first above the water
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
    """The bound for a whole model: pairs of bytes and predicted rise of the mean loss, in nats.

    Args:
        problem: With curvature in its statistics.
        other_bytes: Bytes of the tensors that are no layer's weight; they are counted as they are.
        thetas: Water levels, in nats for each component; None: a quarter of a bit apart, from the coarsest, where no
            weight is left.
        damping: Of the curvature of layers of a kind; None: it is not damped.

    Returns:
        `(other_bytes + rate / 8, D)` for each level, in their order. A layer that no gradient reaches is counted as it
        is, and costs nothing.

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
    """Eigenvalues of a factor [n, n], or of a diagonal one [n]; float64, what is rounding error is 0."""
    if factor.ndim == 1:
        return factor.double().clamp(min=0)
    found = torch.linalg.eigvalsh(factor.double().cpu())
    noise = len(found) * torch.finfo(factor.dtype).eps * found[-1]
    return torch.where(found > noise, found, 0.0)


def _damped(values: Tensor, share: float) -> Tensor:
    """Eigenvalues of a factor to which `share` of its mean diagonal is added."""
    return values + share * values.mean()


def _curvature_of(layer: Layer, statistics: LayerStatistics) -> KroneckerFactors | None:
    """None where the loss does not see the layer."""
    assert statistics.curvature is not None, f"no curvature of {layer.name}"
    return statistics.curvature if statistics.has_derivatives else None


def _usual_levels(signals: list[Signals]) -> list[float]:
    """From the strongest component of all down to where a layer's mean component takes `_FINEST_BITS`."""
    largest = max(one.largest for one in signals)
    mean = sum((one.rows.mean() * one.columns.mean()).item() for one in signals) / len(signals)
    levels = [largest]
    while levels[-1] > mean * 4**-_FINEST_BITS:
        levels.append(levels[-1] * 4 ** (-1 / _LEVELS_PER_BIT))
    return levels
