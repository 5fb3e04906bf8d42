"""Bias correction: moves the mean output error of a rounded weight into the layer's bias.

A weight error d moves the output by `d x`, whose mean over the positions of the calibration rows is `d E[x]`; the bias
`b - d E[x]` cancels it (Nagel et al. 2019, arXiv 1906.04721, section 4.2, with the mean input measured instead of
derived). Error feedback sees the mean in the second moments and leaves little of this error.

The mean input is estimated from a few rows. So the correction is fitted to each half of the calibration batches and
judged by the other: with `c = d E_1[x]` the second-order cost of the mean output changes, in row o, by

    R_oo (c_o^2 - 2 c_o d_o E_2[x])

and the bias is corrected only where the sum over the rows o is negative for both orders of the halves.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hf_lossless.calibration.statistics import Calibration, LayerStatistics
from hf_lossless.storage.layers import Layer, modules_of


def bias_corrections(
    model: nn.Module, layers: Iterable[Layer], calibration: Calibration, error_of: Callable[[Layer], Tensor]
) -> dict[str, Tensor]:
    """Computes the bias corrections, [out] by layer name, of the layers where each half confirms the other's.

    Args:
        model: The original model.
        layers: The layers that are compressed.
        calibration: Statistics with curvature; without it there are no corrections.
        error_of: Computes the weight error d [out, in] of a layer.
    """
    corrections = {}
    for layer in layers:
        statistics = calibration.layers[layer.name]
        has_bias = getattr(layer.module, "bias", None) is not None and len(modules_of(model, layer)) == 1
        if statistics.curvature is None or statistics.curvature.mean_input is None or not has_bias:
            continue
        error = error_of(layer)
        if _confirmed(error, statistics):
            corrections[layer.name] = -(error @ statistics.curvature.mean_input)
    return corrections


def correct_biases(model: nn.Module, corrections: dict[str, Tensor]) -> None:
    """Adds corrections to the biases of a compressed model, in place."""
    with torch.no_grad():
        for name, correction in corrections.items():
            bias = model.get_submodule(name).bias
            assert isinstance(bias, Tensor)
            bias.add_(correction.to(bias))


def _confirmed(error: Tensor, statistics: LayerStatistics) -> bool:
    """Tells whether the correction fitted to either half lowers the cost on the other."""
    if statistics.halves is None or statistics.curvature is None:
        return False
    rows = statistics.curvature.rows
    weights = (rows if rows.ndim == 1 else rows.diagonal()).double()
    means = [half.mean_input for half in statistics.halves]
    first, second = ((error @ mean).double() for mean in means if mean is not None)
    crossed = 2 * (weights * first * second).sum()
    return all(bool((weights * shift.square()).sum() < crossed) for shift in (first, second))
