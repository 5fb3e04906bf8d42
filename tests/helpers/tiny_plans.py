"""Plans written by hand: each layer with the truncated SVD of its weight, on grids that fit it."""

import copy

import torch
from torch import Tensor, nn

from hf_lossless.candidates.low_rank import Factors
from hf_lossless.candidates.uniform import on_grid, quantise
from hf_lossless.storage.grid import stored_bytes
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import Grid, LayerPlan, LowRank


def truncated_svd(matrix: Tensor, rank: int) -> Factors:
    """The factors of the nearest matrix of that rank, the singular values shared between them."""
    left, values, right = torch.linalg.svd(matrix.detach().float(), full_matrices=False)
    root = values[:rank].sqrt()
    return Factors(left[:, :rank] * root, root[:, None] * right[:rank])


def fitting_grid(matrix: Tensor, bits: int, **settings) -> Grid:
    """A grid with the scale dtype that the matrix needs."""
    return quantise(matrix, Grid(bits=bits, **settings)).grid


def by_hand(
    layer: Layer, kind: str, rank: int = 2, *, left: int | None = None, right: int | None = None, bits: int = 3
) -> tuple[LayerPlan, Factors | None]:
    """The plan of one layer, and its factors.

    Args:
        layer: With real weights.
        kind: "kept", "grid", "low_rank" or "sum".
        rank: Of the factors.
        left: Bits of L; None: in floating point.
        right: Bits of R; None: in floating point.
        bits: Of the grid.
    """
    matrix = layer.matrix.detach()
    grid = fitting_grid(matrix, bits, group_size=8) if kind in ("grid", "sum") else None
    factors = low_rank = None
    if kind in ("low_rank", "sum"):
        rest = matrix.float() if grid is None else matrix.float() - on_grid(matrix, grid)
        factors = truncated_svd(rest, rank)
        low_rank = LowRank(
            rank=rank,
            shape=tuple(matrix.shape),
            left=None if left is None else fitting_grid(factors.left, left),
            right=None if right is None else fitting_grid(factors.right, right, group_size=8, symmetric=False),
        )
    return (
        LayerPlan(
            kind=kind,
            grid=grid,
            low_rank=low_rank,
            cost_bytes=cost(layer, grid, low_rank),
            predicted_loss_change=0.0,
            tied=layer.tied,
        ),
        factors,
    )


def cost(layer: Layer, grid: Grid | None, low_rank: LowRank | None) -> int:
    if grid is None and low_rank is None:
        return layer.weight.nbytes
    out_features, in_features = layer.matrix.shape
    bytes_of_parts = [] if grid is None else [stored_bytes(out_features, in_features, grid, rows=layer.packed_rows)]
    if low_rank is not None:
        rows = out_features if layer.kind == "embedding" else 1
        for part, shape, part_rows in (
            (low_rank.left, (out_features, low_rank.rank), rows),
            (low_rank.right, (low_rank.rank, in_features), 1),
        ):
            dense = shape[0] * shape[1] * layer.weight.dtype.itemsize
            bytes_of_parts.append(dense if part is None else stored_bytes(*shape, part, rows=part_rows))
    return sum(bytes_of_parts)


def dense_matrix(layer: Layer, plan: LayerPlan, factors: Factors | None) -> Tensor:
    """What a plan makes of a layer's matrix, computed plainly, in the dtype of the weight."""
    stored = torch.zeros(layer.matrix.shape)
    if plan.grid is not None:
        stored += on_grid(layer.matrix, plan.grid).to(layer.weight.dtype).float()
    if plan.low_rank is not None and factors is not None:
        left = on_grid(factors.left, plan.low_rank.left).to(layer.weight.dtype).float()
        right = on_grid(factors.right, plan.low_rank.right).to(layer.weight.dtype).float()
        stored += left @ right
    return stored.to(layer.weight.dtype)


def dense_twin(layer: Layer, matrix: Tensor) -> nn.Module:
    """The layer's own module with another matrix."""
    twin = copy.deepcopy(layer.module)
    weight = matrix.T if layer.kind == "conv1d" else matrix.view(layer.weight.shape)
    twin.weight = nn.Parameter(weight.clone())
    return twin
