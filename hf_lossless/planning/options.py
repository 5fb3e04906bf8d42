"""The options of the knapsack for each layer: a candidate, its prediction, and the grid of the layer's input.

The bytes of an entropy-coded grid are an estimate until the layer has been rounded on it, and so is its cost. Then
both are corrected: the bytes are replaced by the measured ones, the prediction is multiplied by the ratio of the
measured to the expected cost in the layer's damped metric. The layer's other coded grids are corrected by the same
ratios as the nearest rounded one.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_lossless.candidates.grids import Candidate
from hf_lossless.errors import CalibrationError
from hf_lossless.storage.activation_grid import StaticGrid
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import CodedGrid, LayerPlan
from hf_lossless.theories.problem import Prediction
from hf_lossless.theories.quantised_inputs import ActivationOption, choose_activation

_LARGEST_CORRECTION = 100.0
"""Largest factor by which an estimated cost is corrected."""


@dataclass(frozen=True)
class Option:
    """One option of the knapsack for a layer: its plan, its candidate, and the static grid of its input."""

    plan: LayerPlan
    candidate: Candidate
    static: StaticGrid | None


Options = dict[str, list[Option]]
"""The options of each layer, by name."""


@dataclass(frozen=True)
class RoundedCost:
    """The bytes of a layer rounded on a coded grid, and its cost in the damped metric, in nats."""

    num_bytes: int
    cost: float


def options_of(
    layer: Layer,
    candidates: list[Candidate],
    predictions: list[Prediction],
    activations: list[ActivationOption],
    *,
    may_stay_float: bool,
) -> list[Option]:
    """Makes the options of a layer from the candidates that the theory does not refuse.

    Args:
        layer: The layer.
        candidates: Its candidates.
        predictions: The theory's prediction for each candidate.
        activations: Ways to quantise the layer's input, narrowest first.
        may_stay_float: Whether the input may stay in floating point.

    Returns:
        One option for each usable candidate.

    Raises:
        CalibrationError: The theory refuses all candidates.
    """
    options = []
    for candidate, prediction in zip(candidates, predictions, strict=True):
        if prediction.usable:
            loss_change, cost_bytes, activation = prediction.loss_change, candidate.cost_bytes, None
            if candidate.kind != "kept":
                activation = choose_activation(activations, loss_change, may_stay_float=may_stay_float)
            if activation is not None:
                loss_change += activation.loss_change
                cost_bytes += activation.grid.stored_bytes
            layer_plan = LayerPlan(
                kind=candidate.kind,
                grid=candidate.grid,
                low_rank=candidate.low_rank,
                coded=candidate.coded,
                activation=None if activation is None else activation.grid,
                cost_bytes=cost_bytes,
                predicted_loss_change=_rounded(loss_change),
                regime=prediction.regime,
                tied=layer.tied,
            )
            options.append(Option(layer_plan, candidate, None if activation is None else activation.static))
    if not options:
        widths = [candidate.grid.bits for candidate in candidates if candidate.grid is not None]
        why = f"at each of {widths} bits the loss is not finite, or the theory refuses"
        if not candidates:  # a layer of a few weights
            why = "coded it would take no fewer bytes than it takes now"
        raise CalibrationError(
            f"layer {layer.name!r} can be stored in no way: {why}. Add wider widths (16 keeps a layer), or keep this "
            "layer out with modules_to_not_convert."
        )
    return options


def scaled(option: Option, factor: float) -> Option:
    """Multiplies an option's predicted rise of the loss by `factor`; a predicted fall is not changed.

    Args:
        option: The option.
        factor: Measured over predicted rise of the loss.
    """
    change = option.plan.predicted_loss_change
    if change <= 0:
        return option
    return _with(option, predicted_loss_change=_rounded(change * factor))


def with_rounded_costs(options: list[Option], found: Mapping[CodedGrid, RoundedCost]) -> list[Option]:
    """Corrects the bytes and costs of a layer's coded options by the grids that it was rounded on.

    Args:
        options: The options as predicted.
        found: Bytes and cost of each grid that the layer was rounded on; may be empty.
    """
    estimated = {option.candidate.coded: option.candidate for option in options if option.candidate.coded is not None}
    rounded = {grid: one for grid, one in found.items() if grid in estimated}
    if not rounded:
        return options
    bytes_over = {grid: one.num_bytes / estimated[grid].cost_bytes for grid, one in rounded.items()}
    cost_over = {grid: _ratio(one.cost, estimated[grid].expected_cost) for grid, one in rounded.items()}

    def corrected(option: Option) -> Option:
        coded, estimate = option.candidate.coded, option.candidate.cost_bytes
        if coded is None:
            return option
        nearest = min(rounded, key=lambda grid: abs(math.log(grid.step / coded.step)))
        num_bytes = rounded[coded].num_bytes if coded in rounded else round(bytes_over[nearest] * estimate)
        moved = _with(option, cost_bytes=option.plan.cost_bytes - estimate + num_bytes)
        return scaled(moved, cost_over[nearest])

    return [corrected(option) for option in options]


def _ratio(found: float, expected: float) -> float:
    ratio = found / max(expected, sys.float_info.min)
    return min(max(ratio, 1 / _LARGEST_CORRECTION), _LARGEST_CORRECTION)


def _with(option: Option, **changes: float) -> Option:
    return replace(option, plan=option.plan.model_copy(update=changes))


def _rounded(loss_change: float) -> float:
    """Rounds a predicted change to four digits: further digits are noise, and cost bytes."""
    return float(f"{loss_change:.4g}")
