"""The codes of the layers whose rounding needs the calibration data, once it is decided how each layer is stored."""

from collections import defaultdict
from collections.abc import Mapping

import torch

from hf_lossless.calibration.statistics import Calibration
from hf_lossless.candidates.damping import feedback_damping
from hf_lossless.candidates.feedback import quantise_in_metric
from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import Grid, LayerPlan

_LARGEST_BATCH = 2**24
"""Numbers in the weights of a batch, or in its metrics: 64 MiB in float32, of which rounding holds about ten copies."""


def round_with_feedback(
    layers: list[Layer], layer_plans: Mapping[str, LayerPlan], calibration: Calibration
) -> dict[str, QuantisedMatrix]:
    """Codes and scales by layer name, for every layer that is planned on a grid with the rounding "feedback".

    All calibration rows have their part in it. Layers of one shape are rounded together.

    Layers take their inputs as the original model produces them. Inputs from the part that is compressed already, layer
    by layer, were tried with 128 rows: at 2 bits the divergence on other rows was 0.0144 nats either way on a ViT, and
    0.093 instead of 0.068 on a ResNet; at 3 bits 0.017 instead of 0.020 on MiniLM, within what 744 rows can tell.

    Args:
        layers: All layers, with real weights.
        layer_plans: Layer plans by name.
        calibration: With curvature.
    """
    batches = defaultdict(list)
    for layer in layers:
        grid = layer_plans[layer.name].grid
        if grid is not None and grid.rounding == "feedback":
            batches[_key(layer, grid, calibration)].append((layer, grid))
    rounded = {}
    for members in batches.values():
        largest = max(members[0][0].weight.numel(), _columns(members[0][0], calibration).numel())
        at_once = max(1, _LARGEST_BATCH // largest)
        for start in range(0, len(members), at_once):
            part = members[start : start + at_once]
            results = quantise_in_metric(
                torch.stack([layer.matrix.detach().float() for layer, _ in part]),
                [[grid] for _, grid in part],
                torch.stack([_columns(layer, calibration) for layer, _ in part]),
                feedback_damping(part[0][0].kind),
            )
            rounded.update({layer.name: one for (layer, _), (one,) in zip(part, results, strict=True)})
    return rounded


def _columns(layer: Layer, calibration: Calibration) -> torch.Tensor:
    curvature = calibration.layers[layer.name].curvature
    assert curvature is not None
    return curvature.columns


def _key(layer: Layer, grid: Grid, calibration: Calibration) -> tuple[object, ...]:
    """What the members of a batch have in common: all but their bits."""
    columns = _columns(layer, calibration)
    alike = grid.model_copy(update={"bits": 8})
    return (tuple(layer.matrix.shape), columns.ndim, columns.device, feedback_damping(layer.kind), alike)
