"""Statistics of the calibration pass that predict how rounding a layer's input changes the loss.

Notation: `h_i` is an element of the layer's input at some position of some row, `g_i` the gradient of that row's own
loss with respect to it, `e_i` the error of h_i on a grid. To second order, with the empirical Fisher matrix of the
inputs as their Hessian and with uncorrelated errors, the mean loss over N rows changes by

    dL  ~  1/2 sum_i S_i e_i^2,        S_i = g_i^2 / N

summed over all elements of all rows (LLC Eq. 3 with d = 0, its term in H). The first order is left out, as in
`theories.curvature`. S needs no factorisation, since the pass sees every g_i.

A dynamic grid is computed from the values of the current call, so that its sum is accumulated during the pass, for each
width. A static range is only known when all values have been seen. So S is summed in a histogram of h first, one bin
for each pattern of the highest 12 bits of a float32 (sign, exponent, 3 bits of mantissa): it covers every range, adds
over batches and processes, and its bins are at most an eighth of their value wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lossless.data.processes import sum_over_processes
from hf_lossless.storage.activation_grid import DYNAMIC_AXES, dynamic_range, on_activation_grid, scale_and_zero
from hf_lossless.storage.layers import Layer

NUM_BINS = 4096
_LOW_BITS = 20


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """A histogram of a layer's input values, with the sensitivity of the loss to each bin.

    Attributes:
        counts: Number of values in each bin (see `bin_edges`) that the loss depends on (S_i > 0), float64 [`NUM_BINS`].
            Padding is not counted.
        sensitivity: Sum of S_i over the values of each bin, in nats per squared unit of h, float64 [`NUM_BINS`].
        dynamic: `1/2 sum_i S_i e_i^2` on the dynamic grid of each width, in nats.
    """

    counts: Tensor
    sensitivity: Tensor
    dynamic: dict[int, float]


def bin_of(values: Tensor) -> Tensor:
    """Computes the bin of each value, int64 of the same shape."""
    bits = values.detach().float().contiguous().view(torch.int32)
    return bits.bitwise_right_shift(_LOW_BITS).bitwise_and_(NUM_BINS - 1).long()


def bin_edges() -> tuple[Tensor, Tensor]:
    """Computes the lower and upper edges of all bins, float64 [`NUM_BINS`]; those of infinities and NaN are not finite.

    Example:
        >>> lower, upper = bin_edges()
        >>> one = bin_of(torch.tensor([1.0]))
        >>> lower[one].item(), upper[one].item()
        (1.0, 1.125)
    """
    positive = torch.arange(NUM_BINS // 2 + 1, dtype=torch.int32).bitwise_left_shift(_LOW_BITS)
    positive[-1] = positive[-2]  # the sign bit would be next
    edges = positive.view(torch.float32).double()
    return torch.cat([edges[:-1], -edges[1:]]), torch.cat([edges[1:], -edges[:-1]])


class ActivationSums:
    """Running sums over one layer's inputs."""

    def __init__(self, layer: Layer, widths: Sequence[int]) -> None:
        """Starts at zero for a layer with real-valued input.

        Args:
            layer: The layer.
            widths: Bits of the dynamic grids.
        """
        self.axes = DYNAMIC_AXES[layer.kind]
        self.widths = tuple(widths)
        self.counts = torch.zeros(NUM_BINS, dtype=torch.float64, device=layer.weight.device)
        self.squares = torch.zeros_like(self.counts)
        self.dynamic = torch.zeros(len(self.widths), dtype=torch.float64, device=layer.weight.device)

    def add(self, values: Tensor, gradient: Tensor) -> None:
        """Adds one call of the layer.

        Args:
            values: The layer's input h.
            gradient: Gradient of the mean loss over all rows with respect to h: g / N.
        """
        squares = gradient.detach().double().square()
        bins = bin_of(values)
        self.counts += torch.bincount(bins[squares > 0], minlength=NUM_BINS)
        self.squares += torch.bincount(bins.flatten(), squares.flatten(), minlength=NUM_BINS)
        values = values.float()
        low, high = dynamic_range(values, self.axes)
        for index, bits in enumerate(self.widths):
            error = on_activation_grid(values, *scale_and_zero(low, high, bits), bits) - values
            self.dynamic[index] += (squares * error.double().square()).sum()

    def statistics(self, num_examples: int) -> ActivationStatistics:
        """Computes the statistics from the sums of all processes.

        Args:
            num_examples: N, over all batches and processes.
        """
        sums = sum_over_processes(torch.cat([self.counts, self.squares, self.dynamic])).cpu()
        counts, squares = sums[: 2 * NUM_BINS].view(2, NUM_BINS)
        changes = (0.5 * num_examples * sums[2 * NUM_BINS :]).tolist()
        # g^2 / N = N (g / N)^2
        return ActivationStatistics(counts, num_examples * squares, dict(zip(self.widths, changes, strict=True)))
