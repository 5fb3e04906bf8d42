"""Proposes candidates with factors: low rank instead of the matrix, and low rank for a grid's remainder."""

from collections.abc import Callable, Iterable

from torch import Tensor

from hf_lossless.candidates.grids import Candidate, grid_of
from hf_lossless.candidates.low_rank import Factors, Whitening, factorise
from hf_lossless.candidates.ranks import largest_rank
from hf_lossless.candidates.uniform import on_grid, quantise
from hf_lossless.storage.grid import stored_bytes
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import KEPT_BITS, Grid, LowRank

NARROWEST_FACTOR = 4
"""Least width of the factors' grids, since errors in L are multiplied by R and errors in R by L."""

NARROW_GRID = 4
"""Largest width of a grid whose low-rank remainder is worth its bytes."""


def propose_factored(
    layer: Layer,
    ranks: Iterable[int],
    factors_of: Callable[[int], Factors],
    bits: tuple[int, ...],
    group_size: int | None,
    symmetric: bool,
) -> list[Candidate]:
    """Proposes candidates of kind "low_rank": every rank with every width of the factors, smallest rank first.

    Args:
        layer: The layer, with real weights.
        ranks: Ranks to try.
        factors_of: Computes the factors of a rank.
        bits: Widths; those from `NARROWEST_FACTOR` up are used for both factors, and floating point always, since a
            rank by itself is a way to store a layer.
        group_size: Inputs per scale of a factor, as for grids.
        symmetric: Whether grids are symmetric.

    Returns:
        The candidates that take fewer bytes than the original layer.
    """
    candidates = []
    widths = sorted({KEPT_BITS, *(width for width in bits if width >= NARROWEST_FACTOR)})
    for rank in ranks:
        factors = factors_of(rank)
        for width in widths:
            candidates.append(_candidate(layer, None, 0, factors, width, group_size, symmetric))
    return [candidate for candidate in candidates if candidate.cost_bytes < layer.weight.nbytes]


def propose_sums(
    layer: Layer,
    grids: Iterable[Candidate],
    whitening: Whitening | None,
    bits: tuple[int, ...],
    group_size: int | None,
    symmetric: bool,
) -> list[Candidate]:
    """Proposes candidates of kind "sum": a narrow grid plus the factors of its remainder.

    Args:
        layer: The layer, with real weights.
        grids: Its candidates of kind "grid".
        whitening: Roots of the metric of the SVD; None: the plain SVD.
        bits: Widths; the factors have 8 bits where those are among them, else they are in floating point.
        group_size: Inputs per scale of a factor.
        symmetric: Whether the factors' grids are symmetric.

    Returns:
        For each grid of at most `NARROW_GRID` bits, ranks of a thirty-second and an eighth of `largest_rank`, where
        they take fewer bytes than the original layer.
    """
    width = 8 if 8 in bits else KEPT_BITS
    largest = largest_rank(*layer.matrix.shape)
    if not largest:
        return []
    ranks = sorted({max(1, largest // 32), max(1, largest // 8)})
    candidates = []
    for grid in grids:
        if grid.grid is None or grid.grid.bits > NARROW_GRID:
            continue
        remainder = layer.matrix.detach().float() - on_grid(layer.matrix, grid.grid)
        factorisation = factorise(remainder, whitening, largest=ranks[-1])
        for rank in ranks:
            factors = factorisation.truncated(rank)
            candidates.append(_candidate(layer, grid.grid, grid.cost_bytes, factors, width, group_size, symmetric))
    return [candidate for candidate in candidates if candidate.cost_bytes < layer.weight.nbytes]


def _candidate(
    layer: Layer,
    base: Grid | None,
    base_bytes: int,
    factors: Factors,
    width: int,
    group_size: int | None,
    symmetric: bool,
) -> Candidate:
    left, left_bytes = _stored(factors.left, layer, layer.packed_rows, width, group_size, symmetric)
    right, right_bytes = _stored(factors.right, layer, 1, width, group_size, symmetric)
    out_features, in_features = layer.matrix.shape
    low_rank = LowRank(
        rank=factors.rank, shape=(out_features, in_features), left=left, right=right, lookup=layer.kind == "embedding"
    )
    return Candidate(base, base_bytes + left_bytes + right_bytes, low_rank=low_rank, factors=factors)


def _stored(
    factor: Tensor, layer: Layer, rows: int, width: int, group_size: int | None, symmetric: bool
) -> tuple[Grid | None, int]:
    """Chooses the grid of a factor and counts its bytes; floating-point factors have the layer's dtype."""
    if width == KEPT_BITS:
        return None, factor.numel() * layer.weight.element_size()
    out_features, in_features = factor.shape
    grid = quantise(factor, grid_of(width, in_features, group_size, symmetric)).grid
    return grid, stored_bytes(out_features, in_features, grid, rows=rows)
