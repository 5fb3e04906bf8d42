"""Chooses the damping of coded layers' metrics on rows that the metrics were not made from.

With too little damping, steps and feedback errors get large in directions that cost much on other rows; with too much,
all steps are alike. The quadratic prediction cannot decide, since the harmful errors are not small. So some layers,
spread over the model, are rounded together in the metrics of the even batches, with each damping in turn, and the
divergence of the model's predictions is measured on the odd batches. Since one bit less for every weight quadruples it,
the damping chosen minimises

    log(divergence) + 2 log(2) bits

with the bits per weight that the codes take. Rows and columns share one ladder, in the ratio of the default.
"""

import logging
import math
from contextlib import ExitStack
from dataclasses import replace

from torch import nn

from hf_lossless.calibration.model_labels import divergence, log_probabilities
from hf_lossless.calibration.perturbation import weight_noise
from hf_lossless.calibration.statistics import Calibration
from hf_lossless.candidates.damping import shaped_damping
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.round_coded import round_coded
from hf_lossless.candidates.shaped import step_at
from hf_lossless.data.batches import Batch
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import CodedGrid

LADDER = (0.3, 1.0, 3.0)
"""Factors of the default damping that are tried."""

RESOLUTION = 1.0
"""Root mean square of the weights over the geometric mean of the steps, at which dampings are compared."""

MOST_LAYERS = 8

_logger = logging.getLogger(__name__)


def chosen_scale(model: nn.Module, batches: list[Batch], layers: list[Layer], calibration: Calibration) -> float:
    """Chooses the factor of the default dampings from the ladder; 1 where no held-out batches can decide.

    Args:
        model: The model, in evaluation mode; unchanged afterwards.
        batches: All calibration batches.
        layers: All layers.
        calibration: Statistics with curvature and its halves.
    """
    tried = _evenly_chosen([layer for layer in layers if _has_halves(layer, calibration)])
    before = log_probabilities(model, batches[1::2]) if tried else None
    if not before:
        return 1.0
    even = {
        layer.name: replace(statistics, curvature=statistics.halves[0])
        for layer in tried
        if (statistics := calibration.layers[layer.name]).halves is not None
    }
    fitted = replace(calibration, layers=even)
    costs = {}
    for scale in LADDER:
        rounded = round_coded(tried, {layer.name: _grid(layer, fitted, scale) for layer in tried}, fitted)
        bits = 8 * sum(one.cost_bytes for one in rounded.values()) / sum(layer.matrix.numel() for layer in tried)
        with ExitStack() as stack:
            for layer in tried:
                stack.enter_context(
                    weight_noise(
                        layer, rounded[layer.name].values.dense.to(layer.weight.device) - layer.matrix.detach().float()
                    )
                )
            after = log_probabilities(model, batches[1::2])
        moved = math.inf if after is None else divergence(before, after)
        if math.isfinite(moved):
            costs[scale] = math.log(max(moved, 1e-30)) + 2 * math.log(2) * bits
        _logger.info("damping x %g: divergence %.3g at %.2f bits", scale, moved, bits)
    return min(costs, key=lambda scale: costs[scale], default=1.0)


def _evenly_chosen(layers: list[Layer]) -> list[Layer]:
    return layers[:: math.ceil(len(layers) / MOST_LAYERS)] if layers else []


def _has_halves(layer: Layer, calibration: Calibration) -> bool:
    statistics = calibration.layers[layer.name]
    return (
        statistics.has_derivatives and statistics.halves is not None and all(one.scale > 0 for one in statistics.halves)
    )


def _grid(layer: Layer, calibration: Calibration, scale: float) -> CodedGrid:
    curvature = calibration.layers[layer.name].curvature
    assert curvature is not None
    damping = shaped_damping(layer.kind, scale)
    out_features, in_features = layer.matrix.shape
    step = step_at(RESOLUTION, layer.matrix, InverseRoots.of(curvature, damping))
    return CodedGrid(step=step, damping=damping, shape=(out_features, in_features))
