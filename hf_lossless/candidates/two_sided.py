"""Error feedback from rows and columns: successive rounding in the metric `tr(R d C d')`.

Feedback along the columns (see `feedback`) lets later columns of the same row compensate a rounding error. Where the
gradients of rows are correlated, later rows can do so as well. With the roots `R^-1 = V' V` and `C^-1 = U' U`, upper
triangular, every weight error is `d = V' E U`, and entry (k, i) is rounded after all entries above and to the left:

    t_ki = w_ki + sum_{k' <= k, i' <= i, not both} V_k'k E_k'i' U_i'i,
    q_ki = t_ki rounded to a multiple of its step,      E_ki = (q_ki - t_ki) / (V_kk U_ii)

so that `tr(R d C d') = sum E_ki^2` exactly. It is successive rounding with the metric's Cholesky factor, and that of a
Kronecker product is the product of the factors' Cholesky factors. Tseng et al. 2025 (arXiv 2505.22988) round in such a
metric too.

Entries of one anti-diagonal do not depend on each other. The matrix is cut into square blocks; the blocks of an
anti-diagonal are rounded together, and so are the entries of an anti-diagonal within them; the feedback between blocks
is a matrix product. It takes 2 (out + in) short steps, for any number of matrices in a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lossless.candidates.feedback import Metric, error_feedback
from hf_lossless.candidates.inverse_roots import InverseRoot

_BLOCK = 32
"""Rows and columns of a block."""

_ROWS_AT_ONCE = 8192
"""Rows that are rounded at a time where rows are independent."""


def round_two_sided(
    weights: Tensor,
    row_steps: Tensor,
    column_steps: Tensor,
    rows: Sequence[InverseRoot],
    columns: Sequence[InverseRoot],
) -> Tensor:
    """Rounds matrices of one shape, `W ~ row_steps code column_steps`, with feedback along rows and columns.

    Args:
        weights: W [batch, out, in], float32.
        row_steps: Steps of the rows, [batch, out], positive.
        column_steps: Steps of the columns, [batch, in], positive.
        rows: Inverse root of each matrix's R; all of them diagonal, or none.
        columns: Inverse root of each matrix's C; all of them diagonal, or none.
    """
    if rows[0].is_diagonal:
        if columns[0].is_diagonal:
            return (weights / row_steps[:, :, None] / column_steps[:, None]).round()
        matrices = zip(weights, row_steps, column_steps, columns, strict=True)
        return torch.stack([_round_columns(*matrix) for matrix in matrices])
    # Transposed where columns are diagonal, or where there are more rows than columns: feedback to the rows below
    # is the larger share of the work.
    if columns[0].is_diagonal or weights.shape[1] > weights.shape[2]:
        return round_two_sided(weights.mT, column_steps, row_steps, columns, rows).mT
    row_order, column_order = (torch.stack([one.order for one in roots]) for roots in (rows, columns))
    ordered = weights.take_along_dim(row_order[:, :, None], 1).take_along_dim(column_order[:, None], 2)
    codes = _in_blocks(
        ordered,
        row_steps.take_along_dim(row_order, 1),
        column_steps.take_along_dim(column_order, 1),
        torch.stack([one.root for one in rows]),
        torch.stack([one.root for one in columns]),
    )
    return codes.take_along_dim(row_order.argsort(1)[:, :, None], 1).take_along_dim(column_order.argsort(1)[:, None], 2)


@dataclass
class _Steps:
    """Unbounded levels `row_steps code column_steps`, for feedback along the columns."""

    row_steps: Tensor
    column_steps: Tensor

    def in_order(self, order: Tensor) -> "_Steps":
        return _Steps(self.row_steps, self.column_steps.take_along_dim(order, 1))

    def codes(self, values: Tensor, column: int) -> Tensor:
        return (values / (self.row_steps * self.column_steps[:, column, None])).round_()

    def values(self, codes: Tensor, column: int) -> Tensor:
        return codes * (self.row_steps * self.column_steps[:, column, None])


def _round_columns(weights: Tensor, row_steps: Tensor, column_steps: Tensor, columns: InverseRoot) -> Tensor:
    """Rounds with feedback along the columns alone, for rows that are independent."""
    metric = Metric(columns.root[None], columns.order[None], columns.root[None])
    parts = [
        error_feedback(part.mT[None], _Steps(steps, column_steps[None]), metric)[0].mT
        for part, steps in zip(torch.split(weights, _ROWS_AT_ONCE), torch.split(row_steps, _ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts)


def _in_blocks(weights: Tensor, row_steps: Tensor, column_steps: Tensor, V: Tensor, U: Tensor) -> Tensor:
    """Rounds ordered matrices [batch, out, in], one anti-diagonal of blocks after the other; returns codes."""
    batch, num_rows, num_columns = weights.shape
    row_padding, column_padding = -num_rows % _BLOCK, -num_columns % _BLOCK
    W = F.pad(weights, (0, column_padding, 0, row_padding))
    row_steps = F.pad(row_steps, (0, row_padding), value=1.0)
    column_steps = F.pad(column_steps, (0, column_padding), value=1.0)
    V, U = _padded(V, row_padding), _padded(U, column_padding)
    codes, E_U = torch.empty_like(W), torch.zeros_like(W)
    heights, widths = W.shape[1] // _BLOCK, W.shape[2] // _BLOCK
    spans = [slice(index * _BLOCK, (index + 1) * _BLOCK) for index in range(max(heights, widths))]
    for diagonal in range(heights + widths - 1):
        places = [
            (spans[above], spans[diagonal - above])
            for above in range(max(0, diagonal - widths + 1), min(heights, diagonal + 1))
        ]
        targets = [
            W[:, k, i] + V[:, : k.stop, k].mT @ E_U[:, : k.stop, i]  # from the blocks above and to the left
            for k, i in places
        ]
        found, errors = _round_block(
            torch.cat(targets),
            torch.cat([row_steps[:, k, None] * column_steps[:, None, i] for k, i in places]),
            torch.cat([V[:, k, k] for k, _ in places]),
            torch.cat([U[:, i, i] for _, i in places]),
        )
        for (k, i), own_codes, own_errors in zip(
            places, torch.split(found, batch), torch.split(errors, batch), strict=True
        ):
            codes[:, k, i] = own_codes
            E_U[:, k, i.start :] += own_errors @ U[:, i, i.start :]
    return codes[:, :num_rows, :num_columns]


def _round_block(targets: Tensor, steps: Tensor, V: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds blocks [blocks, side, side] by anti-diagonals; returns codes and normalised errors E."""
    side = targets.shape[1]
    scale = V.diagonal(dim1=1, dim2=2)[:, :, None] * U.diagonal(dim1=1, dim2=2)[:, None]
    above = V.mT.contiguous()
    E_U = torch.zeros_like(targets)  # (E U)', so that a column is a row of memory
    codes, errors = torch.empty_like(targets).flatten(1), torch.empty_like(targets).flatten(1)
    targets, steps, scale = targets.flatten(1), steps.flatten(1), scale.flatten(1)
    for diagonal in range(2 * side - 1):
        first, last = max(0, diagonal - side + 1), min(side - 1, diagonal)  # of rows k, and of columns i = diagonal - k
        k = slice(first, last + 1)
        places = torch.arange(first, last + 1, device=targets.device) * (side - 1) + diagonal  # k side + i
        shift = (above[:, k, : last + 1] * E_U[:, k, : last + 1].flip(1)).sum(2)
        wanted, step = targets[:, places] + shift, steps[:, places]
        rounded = (wanted / step).round_()
        error = (rounded * step - wanted) / scale[:, places]
        codes[:, places], errors[:, places] = rounded, error
        E_U[:, first:, k] += (U[:, k, first:].flip(1) * error[:, :, None]).mT
    return codes.view(-1, side, side), errors.view(-1, side, side)


def _padded(root: Tensor, padding: int) -> Tensor:
    """Pads a root with rows and columns of the identity."""
    if not padding:
        return root
    root = F.pad(root, (0, padding, 0, padding))
    root.diagonal(dim1=1, dim2=2)[:, -padding:] = 1
    return root
