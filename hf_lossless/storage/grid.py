"""Uniform grids as they are stored, as codes, scales and zeros of a matrix `W [out, in]`, and their dequantisation.

W[o, i] ~ scale[o, g] * (code[o, i] - zero[o, g]),      g = i // group_size
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from hf_lossless.storage.packing import packed_width
from hf_lossless.storage.plan import Grid


@dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix on a grid.

    Attributes:
        codes: uint8 [out, in], each below 2^bits.
        scales: [out, groups], in `grid.scale_dtype`.
        zeros: [out, groups], in `grid.scale_dtype`; None for a symmetric grid.
        grid: The grid, with the scale dtype that is stored.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    grid: Grid

    @property
    def dense(self) -> Tensor:
        """Returns the dequantised matrix, float32 [out, in]."""
        return dequantise(self.codes, self.scales, self.zeros, self.grid)


def dequantise(codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """Computes the values of codes: `scale * (code - zero)`, float32 [out, in].

    Args:
        codes: uint8 [out, in].
        scales: [out, groups].
        zeros: [out, groups], or None for a symmetric grid.
        grid: The grid of the codes.
    """
    values = codes.float()
    start = 0
    # In place, group by group: expanding the scales to all weights first would be one more pass over a matrix.
    for block in group_blocks(values, grid):
        groups = slice(start, start := start + block.shape[1])
        block -= symmetric_zero(grid) if zeros is None else zeros[:, groups, None].float()
        block *= scales[:, groups, None].float()
    return values


def per_weight(per_group: Tensor, in_features: int, grid: Grid) -> Tensor:
    """Expands one number per group to one per weight.

    Args:
        per_group: [out, groups].
        in_features: Columns of the matrix.
        grid: The grid.

    Returns:
        float32 [out, in], or [out, 1] where one group is the whole row.
    """
    per_group = per_group.float()
    if grid.num_groups(in_features) == 1:
        return per_group
    return per_group.repeat_interleave(grid.group_size or in_features, dim=1)[:, :in_features]


def symmetric_zero(grid: Grid) -> float:
    """Returns the code of zero on a symmetric grid."""
    return 2.0 ** (grid.bits - 1) if grid.bits > 1 else 0.5


def stored_bytes(out_features: int, in_features: int, grid: Grid, *, rows: int) -> int:
    """Computes the bytes of codes, scales and zeros of a matrix as stored.

    Args:
        out_features: Rows of the matrix.
        in_features: Columns of the matrix.
        grid: The grid, with the scale dtype that is stored.
        rows: Rows in which the codes are packed (see `modules`): `out_features` for embeddings, else 1.
    """
    code_bytes = rows * packed_width(out_features * in_features // rows, grid.bits)
    numbers_per_group = 1 if grid.symmetric else 2
    scale_bytes = 2 if grid.scale_dtype == "float16" else 4
    return code_bytes + out_features * grid.num_groups(in_features) * numbers_per_group * scale_bytes


def group_blocks(matrix: Tensor, grid: Grid) -> Iterable[Tensor]:
    """Yields views [out, groups, size]: all full groups of a row, then the shorter last one if there is one."""
    in_features = matrix.shape[1]
    size = grid.group_size or in_features
    full = in_features // size * size
    if full:
        yield matrix[:, :full].view(len(matrix), full // size, size)
    if full < in_features:
        yield matrix[:, full:].unsqueeze(1)
