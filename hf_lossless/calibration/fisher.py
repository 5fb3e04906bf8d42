"""The curvature from labels that the model itself predicts, in place of the data's."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_lossless.calibration.model_labels import with_drawn_labels
from hf_lossless.calibration.perturbation import seeded_number
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.data.batches import Batch, batch_loss
from hf_lossless.storage.layers import Layer


@dataclass(frozen=True)
class DrawnBatches:
    """Batches with labels drawn from the model's predictions.

    Attributes:
        batches: Several of each batch of the data.
        halves: The half, 0 or 1, of each: that of the batch of the data.
    """

    batches: list[Batch]
    halves: list[int]


def drawn_batches(model: nn.Module, batches: list[Batch], seed: int) -> DrawnBatches | None:
    """Draws labels for all batches; None where the model's loss is not a cross-entropy of its scores.

    Args:
        model: In evaluation mode.
        batches: As for `batch_loss`.
        seed: Of the draws.
    """
    drawn = []
    halves = []
    for index, batch in enumerate(batches):
        copies = with_drawn_labels(model, batch, torch.Generator().manual_seed(seeded_number(seed, index)))
        if copies is None:
            return None
        drawn += copies
        halves += [index % 2] * len(copies)
    return DrawnBatches(drawn, halves)


def with_fisher(
    calibration: Calibration,
    model: nn.Module,
    drawn: DrawnBatches,
    layers: list[Layer],
    advance: Callable[[], object] = lambda: None,
) -> Calibration:
    """The statistics with the curvature of drawn labels.

    Args:
        calibration: Of the data.
        model: In evaluation mode.
        drawn: Batches with drawn labels.
        layers: The layers to watch.
        advance: Called after every batch.
    """
    found = calibrate(model, drawn.batches, layers, batch_loss, advance, curvature=True, halves=drawn.halves).layers
    statistics = {
        name: replace(one, curvature=found[name].curvature, halves=found[name].halves)
        for name, one in calibration.layers.items()
    }
    return replace(calibration, layers=statistics)
