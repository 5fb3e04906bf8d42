"""Proposes for a layer: keeping it, and a grid of each width."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lossless.calibration.statistics import LayerStatistics
from hf_lossless.candidates.low_rank import Factors
from hf_lossless.candidates.rounding import aligned_rounding
from hf_lossless.candidates.uniform import on_grid, quantise
from hf_lossless.errors import CalibrationError
from hf_lossless.storage.grid import dequantise, stored_bytes
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import KEPT_BITS, CodedGrid, Grid, LayerPlanKind, LowRank, Rounding, kind_of_parts


@dataclass(frozen=True)
class Candidate:
    """One way to store one layer.

    Attributes:
        grid: The grid; None where the layer is kept or has factors only.
        cost_bytes: Bytes of the weight stored this way.
        step: For kind "grid": root mean square of its scales, the `scale_weight` of LLC Algorithm 1.
        noise: For kind "grid": ||d|| / sqrt(size(d)) of the weight error d.
        scales: For kind "grid": its scales [out, groups].
        low_rank: Rank and grids of the factors, where there are factors.
        factors: Values of the factors, before they are put on their grids.
        coded: The shaped grid, for kind "coded"; its `cost_bytes` are estimated.
        expected_cost: For kind "coded": its expected cost in the damped metric that shaped it, in nats.
    """

    grid: Grid | None
    cost_bytes: int
    step: float = 0.0
    noise: float = 0.0
    scales: Tensor | None = None
    low_rank: LowRank | None = None
    factors: Factors | None = None
    coded: CodedGrid | None = None
    expected_cost: float = 0.0

    @property
    def kind(self) -> LayerPlanKind:
        """Returns the kind of storage, as layer plans name it."""
        kind = kind_of_parts(self.grid, self.low_rank, self.coded)
        assert kind is not None
        return kind

    def error(self, matrix: Tensor) -> Tensor:
        """Computes the weight error `d = stored - W`, float32 [out, in], where codes do not depend on data.

        Args:
            matrix: The layer's W [out, in].
        """
        depends = self.coded is not None or (self.grid is not None and self.grid.rounding == "feedback")
        assert not depends, "its codes depend on data: see Planned.error"
        if self.kind == "kept":
            return torch.zeros_like(matrix, dtype=torch.float32)
        stored = torch.zeros_like(matrix, dtype=torch.float32)
        if self.grid is not None:
            stored += on_grid(matrix, self.grid)
        if self.low_rank is not None and self.factors is not None:
            left = _as_stored(self.factors.left, self.low_rank.left, matrix.dtype)
            stored += left @ _as_stored(self.factors.right, self.low_rank.right, matrix.dtype)
        return stored - matrix.detach().float()


def _as_stored(factor: Tensor, grid: Grid | None, dtype: torch.dtype) -> Tensor:
    """Returns a factor on its grid, or in the layer's dtype where it has none; float32."""
    return on_grid(factor if grid is not None else factor.to(dtype), grid)


def propose_grids(
    layer: Layer, statistics: LayerStatistics, bits: tuple[int, ...], group_size: int | None, symmetric: bool
) -> list[Candidate]:
    """Proposes keeping a layer and one grid for each width, widest last.

    Args:
        layer: The layer, with real weights.
        statistics: Its statistics; the sign of its mean gradient may set the direction of rounding (LLC Eq. 7 and 8). A
            layer that the calibration data never reached can only be kept, since the effect of an error in it is
            unknown.
        bits: Widths to try; 16 stands for keeping the layer.
        group_size: Inputs per scale; None, or more than the layer has, means one scale per output channel.
        symmetric: Whether grids are symmetric.

    Raises:
        CalibrationError: The weight holds NaN or infinity.
    """
    matrix = layer.matrix
    refuse_infinite(layer)
    keep = Candidate(None, layer.weight.nbytes)
    if not statistics.calls:
        return [keep]
    out_features, in_features = matrix.shape
    candidates = []
    for width in sorted(bits):
        if width == KEPT_BITS:
            candidates.append(keep)
            continue
        rounding = aligned_rounding(statistics.weight_gradient)
        grid = grid_of(width, in_features, group_size, symmetric, rounding)
        quantised = quantise(matrix, grid)
        error = dequantise(quantised.codes, quantised.scales, quantised.zeros, quantised.grid) - matrix.float()
        candidates.append(
            Candidate(
                grid=quantised.grid,
                cost_bytes=stored_bytes(out_features, in_features, quantised.grid, rows=layer.packed_rows),
                step=quantised.scales.float().square().mean().sqrt().item(),
                noise=error.square().mean().sqrt().item(),
                scales=quantised.scales,
            )
        )
    return candidates


def refuse_infinite(layer: Layer) -> None:
    """Raises CalibrationError where the weight holds NaN or infinity.

    Args:
        layer: The layer, with real weights.
    """
    if not torch.isfinite(layer.weight).all():
        raise CalibrationError(
            f"the weight of layer {layer.name!r} holds NaN or infinity. Take a checkpoint with finite weights, "
            "or keep this layer out with modules_to_not_convert."
        )


def grid_of(
    bits: int, in_features: int, group_size: int | None, symmetric: bool, rounding: Rounding = "nearest"
) -> Grid:
    """Makes the grid of a matrix with `in_features` inputs; groups as long as a row become one scale per row.

    Args:
        bits: Width of a code.
        in_features: Inputs of the matrix.
        group_size: Inputs per scale; None: one scale per row.
        symmetric: Whether the grid is symmetric.
        rounding: How positions are rounded to codes.
    """
    if group_size is not None and group_size >= in_features:
        group_size = None
    return Grid(bits=bits, group_size=group_size, symmetric=symmetric, rounding=rounding)
