"""Rate-aware rounding within the error feedback: of a weight's two neighbours the one of less loss + lambda bits.

An error of z - t steps costs `c^2 / 2 (z - t)^2` nats. At high rate a bit less for a weight costs c^2 ln2 / 12,
which is lambda at `share` 1. Bits are those of a Laplace density of the block's (or column's) own spread, b steps:

    bits(n + 1) - bits(n) = 1 / (b ln2)  for n >= 1,     log2 of P(0) / P(1)  for n = 0

so that a weight between n and n + 1 goes up only beyond n + 1/2 + share ln2 / 12 (bits(n + 1) - bits(n)).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from hf_lossless.candidates import two_sided


def rate_aware(positions: Tensor, scales: Tensor, share: float) -> Tensor:
    """Codes of weights.

    Args:
        positions: t, weights over their steps.
        scales: b, mean |t| of the density.
        share: Of the high-rate lambda; 0: to nearest.
    """
    inverse = 1 / scales.clamp(min=0.02)
    tail = (-inverse / 2).exp()
    of_zero = ((1 - tail) / (0.5 * tail * (1 - tail.square()))).log2()
    below = positions.abs().floor()
    bits = torch.where(below == 0, of_zero, inverse / math.log(2))
    offset = (share * math.log(2) / 12 * bits).clamp(max=0.5)
    return positions.sign() * (positions.abs() + 0.5 - offset).floor()


@contextmanager
def rounding_with(share: float) -> Iterator[None]:
    """Feedback from both roots rounds in this way."""

    def codes(self: two_sided._Steps, values: Tensor, column: int) -> Tensor:
        positions = values / (self.row_steps * self.column_steps[:, column, None])
        return rate_aware(positions, positions.abs().mean(-1, keepdim=True), share)

    def round_block(targets: Tensor, steps: Tensor, V: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        return _round_block(targets, steps, V, U, share)

    with patch.object(two_sided._Steps, "codes", codes), patch.object(two_sided, "_round_block", round_block):
        yield


def _round_block(targets: Tensor, steps: Tensor, V: Tensor, U: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """As `two_sided._round_block`, entry by entry along anti-diagonals."""
    side = targets.shape[1]
    scale = V.diagonal(dim1=1, dim2=2)[:, :, None] * U.diagonal(dim1=1, dim2=2)[:, None]
    scales = targets.abs().mean((1, 2), keepdim=True) / steps
    E_U = torch.zeros_like(targets)  # E U
    codes, errors = torch.empty_like(targets), torch.empty_like(targets)
    for diagonal in range(2 * side - 1):
        k = torch.arange(max(0, diagonal - side + 1), min(side - 1, diagonal) + 1)
        i = diagonal - k
        wanted = targets[:, k, i] + (V[:, :, k] * E_U[:, :, i]).sum(1)
        rounded = rate_aware(wanted / steps[:, k, i], scales[:, k, i], share)
        error = (rounded * steps[:, k, i] - wanted) / scale[:, k, i]
        codes[:, k, i], errors[:, k, i] = rounded, error
        E_U[:, k] += error[:, :, None] * U[:, i]
    return codes, errors
