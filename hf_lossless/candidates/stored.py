"""Rounds layers without calibration data: from a layer's plan to its stored values."""

from torch import Tensor

from hf_lossless.candidates.low_rank import Factors
from hf_lossless.candidates.uniform import quantise
from hf_lossless.errors import PlanError
from hf_lossless.storage.activation_grid import StaticGrid
from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import Grid, LayerPlan
from hf_lossless.storage.values import EncodedMatrix, FactoredMatrix, StoredLayer


def stored_layer(
    layer: Layer,
    plan: LayerPlan,
    *,
    factors: Factors | None = None,
    rounded: QuantisedMatrix | EncodedMatrix | None = None,
    static: StaticGrid | None = None,
) -> StoredLayer:
    """Puts a layer's weight, or its factors, on the planned grids.

    Args:
        layer: The layer, with real weights.
        plan: Its plan.
        factors: L [out, r] and R [r, in] of the planned rank, for the kinds "low_rank" and "sum". A factor without a
            planned grid gets the dtype of the layer's weight.
        rounded: Codes that depend on the calibration data (`round_with_feedback`, `round_coded`), for the kind "coded"
            and for grids with the rounding "feedback".
        static: Levels of the layer's input, where the plan has a static range for it.

    Raises:
        PlanError: Factors are missing, or the weight needs scales of another dtype than the plan says.
    """
    if plan.kind == "kept" or rounded is not None or plan.coded is not None:
        return StoredLayer(plan, rounded, static)
    if plan.low_rank is None:
        assert plan.grid is not None
        values = None if plan.grid.rounding == "feedback" else _on_grid(layer, layer.matrix, plan.grid)
        return StoredLayer(plan, values, static)
    if factors is None:
        raise PlanError(
            f"the plan factorises layer {layer.name!r}, but its factors were not given. "
            "Give them: stored_layer(layer, plan, factors=Factors(left, right))."
        )
    return StoredLayer(
        plan,
        FactoredMatrix(
            _factor(layer, factors.left, plan.low_rank.left),
            _factor(layer, factors.right, plan.low_rank.right),
            None if plan.grid is None else _on_grid(layer, layer.matrix, plan.grid),
        ),
        static,
    )


def _factor(layer: Layer, factor: Tensor, grid: Grid | None) -> QuantisedMatrix | Tensor:
    return factor.to(layer.weight.dtype) if grid is None else _on_grid(layer, factor, grid)


def _on_grid(layer: Layer, matrix: Tensor, grid: Grid) -> QuantisedMatrix:
    quantised = quantise(matrix, grid)
    if quantised.grid != grid:
        raise PlanError(
            f"the plan stores the scales of layer {layer.name!r} as {grid.scale_dtype}, its weight needs "
            f"{quantised.grid.scale_dtype}: the plan was made for other weights. Make one for these."
        )
    return quantised
