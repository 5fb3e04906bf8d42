"""Uniform grids: a matrix `W [out, in]` to codes, scales and zeros, and back.

    W[o, i] ~ scale[o, g] * (code[o, i] - zero[o, g]),      g = i // group_size

Each group gets the range with the least squared error among a few (the full range, and the Laplace and Gauss ranges of
ACIQ, see `clipping`); where columns have weights, the one with the least weighted error among these and a ladder of
shares of the full range. A symmetric scale may be negative: a grid of 2^b levels around zero has one more level on one
side, and the sign gives it to the side with the largest weight.
"""

from collections.abc import Iterable
from itertools import chain, repeat

import torch
from torch import Tensor

from hf_lossless.candidates.clipping import gaussian_clip, laplace_clip
from hf_lossless.candidates.rounding import round_positions
from hf_lossless.storage.grid import QuantisedMatrix, dequantise, group_blocks, per_weight, symmetric_zero
from hf_lossless.storage.plan import Grid

_LADDER = tuple(step / 20 for step in range(6, 20))
"""Shares of the full range that are tried where columns have weights."""

_HALF_SMALLEST_NORMAL = 2.0**-14
_HALF_LARGEST = 65504.0
_HALF_LARGEST_ZERO = 256.0
"""Above this, float16 would store a zero point with an error of more than a sixteenth of a step."""


def quantise(matrix: Tensor, grid: Grid, column_weights: Tensor | None = None) -> QuantisedMatrix:
    """Puts a matrix on a grid, each weight independently.

    Args:
        matrix: Weights [out, in], finite, of any floating dtype.
        grid: The grid; its `scale_dtype` is determined here and not read.
        column_weights: Weight of a squared error in each column, [in]; None: equal weights.

    Returns:
        Codes, scales and zeros. `dequantise` of them is within half a step (one step for one-sided rounding) of every
        weight that is inside its group's range.

    Example:
        >>> weights = torch.tensor([[-1.0, -0.5, 0.0, 0.5]])
        >>> quantised = quantise(weights, Grid(bits=2))
        >>> dequantise(quantised.codes, quantised.scales, quantised.zeros, quantised.grid)
        tensor([[-1.0000, -0.5000,  0.0000,  0.5000]])
    """
    matrix = matrix.detach().float()
    blocks = list(group_blocks(matrix, grid))
    if column_weights is None:
        ranges = [_best_range(block, grid, None) for block in blocks]
    else:
        weights = group_blocks(column_weights.float()[None], grid)
        ranges = [_best_range(*pair) for pair in zip(blocks, repeat(grid), weights)]
    scales = torch.cat([scale for scale, _ in ranges], dim=1)
    zeros = None if grid.symmetric else torch.cat([zero for _, zero in ranges], dim=1)
    scale_dtype = _scale_dtype(scales, zeros)
    grid = grid.model_copy(update={"scale_dtype": str(scale_dtype).removeprefix("torch.")})
    scales = scales.to(scale_dtype)
    zeros = None if zeros is None else zeros.to(scale_dtype)
    codes = _codes(matrix, per_weight(scales, matrix.shape[1], grid), _zero_points(zeros, matrix.shape[1], grid), grid)
    return QuantisedMatrix(codes.to(torch.uint8), scales, zeros, grid)


def on_grid(matrix: Tensor, grid: Grid | None) -> Tensor:
    """Rounds a matrix to a grid and dequantises it, float32 [out, in]; without a grid only the dtype changes.

    Args:
        matrix: Weights [out, in], of any floating dtype.
        grid: The grid; None: the matrix is only converted to float32.
    """
    if grid is None:
        return matrix.detach().float()
    quantised = quantise(matrix, grid)
    return dequantise(quantised.codes, quantised.scales, quantised.zeros, quantised.grid)


def _best_range(block: Tensor, grid: Grid, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Finds scale and zero [out, groups] with the least squared, or weighted, error among the candidate ranges."""
    # In units of a power of two near the largest weight: squares of huge or tiny weights would overflow or underflow.
    largest = torch.frexp(block.abs().amax(-1))
    unit = torch.ldexp(torch.ones_like(largest.mantissa), largest.exponent - 1)
    block = block / unit[..., None]
    best_scale = best_zero = torch.zeros(block.shape[:2], device=block.device)
    best_error = torch.full_like(best_scale, torch.inf)
    for scale, zero in chain(_ranges(block, grid), () if weights is None else _shares(block, grid)):
        codes = _codes(block, scale[..., None], zero[..., None], grid)
        squares = (scale[..., None] * (codes - zero[..., None]) - block).square_()
        error = squares.sum(-1) if weights is None else squares.mul_(weights).sum(-1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)
    return best_scale * unit, best_zero


def _ranges(block: Tensor, grid: Grid) -> Iterable[tuple[Tensor, Tensor]]:
    """Yields pairs (scale, zero), each [out, groups]: the full range first, then the ranges of ACIQ inside it."""
    low, high = block.amin(-1), block.amax(-1)
    last_code = 2**grid.bits - 1
    if grid.symmetric:
        centre = torch.zeros_like(low)
        zero = torch.full_like(low, symmetric_zero(grid))
        reach = torch.maximum(-low, high)
        sign = torch.where(high > -low, -1.0, 1.0)  # the extra level is at code 0: scale * (0 - zero) < 0 for scale > 0
        yield sign * reach / max(last_code - symmetric_zero(grid), 0.5), zero
        yield sign * reach / symmetric_zero(grid), zero
    else:
        centre = block.mean(-1)
        reach = torch.maximum(centre - low, high - centre)
        sign = torch.ones_like(low)
        width = high - low
        scale = torch.where(width > 0, width / last_code, low.abs())  # a constant group: one level at its value
        yield scale, -low / _nonzero(scale)
    deviations = block - centre[..., None]
    laplace = laplace_clip(grid.bits) * deviations.abs().mean(-1)
    gaussian = gaussian_clip(grid.bits) * deviations.square().mean(-1).sqrt()
    for clip in (laplace, gaussian):
        clip = torch.minimum(clip, reach)
        if grid.symmetric:
            yield sign * clip / 2 ** (grid.bits - 1), zero
        else:
            # 2^bits bins over [centre - clip, centre + clip], a level at the middle of each
            scale = clip / 2 ** (grid.bits - 1)
            yield scale, (2**grid.bits - 1) / 2 - centre / _nonzero(scale)


def _shares(block: Tensor, grid: Grid) -> Iterable[tuple[Tensor, Tensor]]:
    """Yields shares of the full range as pairs (scale, zero), each [out, groups]."""
    full_scale, full_zero = next(iter(_ranges(block, grid)))
    middle = full_scale * ((2**grid.bits - 1) / 2 - full_zero)
    for share in _LADDER:
        scale = full_scale * share
        zero = full_zero if grid.symmetric else (2**grid.bits - 1) / 2 - middle / _nonzero(scale)
        yield scale, zero


def _codes(values: Tensor, scales: Tensor, zeros: Tensor | float, grid: Grid) -> Tensor:
    """Computes codes as floats; a group of zeros has scale 0, and any code stands for 0."""
    positions = values / _nonzero(scales)
    positions += zeros
    return round_positions(positions, grid.rounding, scales).clamp_(0, 2**grid.bits - 1)


def _zero_points(zeros: Tensor | None, in_features: int, grid: Grid) -> Tensor | float:
    return symmetric_zero(grid) if zeros is None else per_weight(zeros, in_features, grid)


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales.float())


def _scale_dtype(scales: Tensor, zeros: Tensor | None) -> torch.dtype:
    sizes = scales.abs()
    fits = bool(((sizes == 0) | ((sizes >= _HALF_SMALLEST_NORMAL) & (sizes <= _HALF_LARGEST))).all())
    fits = fits and (zeros is None or bool((zeros.abs() <= _HALF_LARGEST_ZERO).all()))
    return torch.float16 if fits else torch.float32
