"""Measures the Fisher matrix of the model's own predictions, in place of the curvature from the data's labels.

With p [K] the probabilities of a label's classes and z [K] its scores, the Fisher matrix with respect to the scores is

    F = diag(p) - p p' = B B',      B = (diag(sqrt p) - p sqrt(p)') Q   [K, K - 1],

with Q any orthonormal basis of the complement of sqrt(p) (the null space of the first factor). So the K - 1
"losses" `sum_k B_kj z_k` have gradients whose second moments add up to the Fisher matrix itself: one backward pass for
two classes, two for three, with no sampling noise. This is done where rows have one label each and K - 1 is at most
`DRAWS`. Elsewhere labels are drawn from p (`model_labels`), whose gradients have the same expected second moments: more
classes would take more passes, and labels of one row (tokens, the two ends of an answer) would need their cross terms.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_lossless.calibration.model_labels import DRAWS, ScoredLabels, scored_labels, with_drawn_labels
from hf_lossless.calibration.perturbation import seeded_number
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.data.batches import Batch, LossFunction, batch_loss
from hf_lossless.storage.layers import Layer

_DIRECTION = "hf_lossless_direction"
"""Key of the directions [rows, classes] that a batch's scores are multiplied by."""


@dataclass(frozen=True)
class FisherBatches:
    """Batches whose losses have gradients with second moments that average to the Fisher matrix.

    Attributes:
        batches: Several copies of each batch of the data.
        halves: Half, 0 or 1, of each copy: that of the batch it was made of.
        loss: Loss to backpropagate: `direction_loss`, or the model's own where labels are drawn.
    """

    batches: list[Batch]
    halves: list[int]
    loss: LossFunction

    @property
    def is_exact(self) -> bool:
        """Tells whether the batches give the Fisher matrix itself, not an estimate by drawn labels."""
        return self.loss is direction_loss


def fisher_batches(model: nn.Module, batches: list[Batch], seed: int) -> FisherBatches | None:
    """Makes the batches that a model's Fisher matrix is computed from; one forward pass.

    Args:
        model: In evaluation mode.
        batches: Batches, as for `batch_loss`.
        seed: Seed of the draws.

    Returns:
        The batches; None where the model's loss is not a cross-entropy of scores that it returns.
    """
    return _fisher_batches(model, batches, seed, exact=True)


def _fisher_batches(model: nn.Module, batches: list[Batch], seed: int, *, exact: bool) -> FisherBatches | None:
    """Makes Fisher batches one batch at a time, to save memory; drawn for all where one cannot be exact."""
    made: list[Batch] = []
    halves: list[int] = []
    for index, batch in enumerate(batches):
        labels = scored_labels(model, batch)
        if labels is None:
            return None
        if exact and not _is_exact(labels):
            return _fisher_batches(model, batches, seed, exact=False)
        generator = torch.Generator().manual_seed(seeded_number(seed, index))
        copies = _with_directions(batch, labels) if exact else with_drawn_labels(batch, labels, generator)
        made += copies
        halves += [index % 2] * len(copies)
    return FisherBatches(made, halves, direction_loss if exact else batch_loss)


def with_fisher(
    calibration: Calibration,
    model: nn.Module,
    fisher: FisherBatches,
    layers: list[Layer],
    advance: Callable[[], object] = lambda: None,
) -> Calibration:
    """Replaces the statistics' curvature by the Fisher matrix; one forward and one backward pass a batch.

    Args:
        calibration: Statistics of the data.
        model: In evaluation mode.
        fisher: Batches from `fisher_batches`.
        layers: The layers to watch.
        advance: Called after every batch.
    """
    found = calibrate(model, fisher.batches, layers, fisher.loss, advance, curvature=True, halves=fisher.halves).layers
    statistics = {
        name: replace(one, curvature=found[name].curvature, halves=found[name].halves)
        for name, one in calibration.layers.items()
    }
    return replace(calibration, layers=statistics)


def fisher_roots(probabilities: Tensor) -> Tensor:
    """Computes B with `B B' = diag(p) - p p'`.

    Q consists of all columns but the last of the Householder reflection that maps sqrt(p) to the last axis.

    Args:
        probabilities: p, [rows, K]; rows sum to one.

    Returns:
        B, [rows, K, K - 1].

    Example:
        >>> fisher_roots(torch.tensor([[0.5, 0.5]])).abs()
        tensor([[[0.5000],
                 [0.5000]]])
    """
    roots = probabilities.sqrt()
    reflected = roots.clone()
    reflected[:, -1] += 1  # no cancellation, for roots are not negative
    reflected = reflected / reflected.norm(dim=1, keepdim=True)
    identity = torch.eye(roots.shape[1], dtype=roots.dtype, device=roots.device)
    basis = identity - 2 * reflected[:, :, None] * reflected[:, None]
    factor = torch.diag_embed(roots) - probabilities[:, :, None] * roots[:, None]
    found: Tensor = factor @ basis[:, :, :-1]
    return found


def direction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Computes the mean over rows of `sum_k direction_k z_k`, with z the scores of a row.

    Args:
        model: In evaluation mode.
        batch: A batch of `fisher_batches`: arguments without labels and with the directions, or inputs and directions.
    """
    if isinstance(batch, Mapping):
        arguments = {name: value for name, value in batch.items() if name != _DIRECTION}
        scores: Tensor = model(**arguments).logits
        directions: Tensor = batch[_DIRECTION]
        return (scores.float() * directions).sum(1).mean()
    inputs, directions = batch
    scores = model(inputs)
    assert isinstance(directions, Tensor)
    return (scores.float() * directions).sum(1).mean()


def _is_exact(labels: Mapping[str, ScoredLabels]) -> bool:
    """Tells whether rows have one label each, of few classes, none of which the loss ignores."""
    if set(labels) not in ({"labels"}, {"targets"}):
        return False
    [one] = labels.values()
    return one.scores.ndim == 2 and one.scores.shape[1] - 1 <= DRAWS and len(one.used_scores) == len(one.scores)


def _with_directions(batch: Batch, labels: Mapping[str, ScoredLabels]) -> list[Batch]:
    """Copies a batch for each column of B, scaled because the copies are averaged and not summed."""
    [one] = labels.values()
    roots = fisher_roots(one.scores.double().softmax(1)).float().cpu()
    columns = (roots * math.sqrt(roots.shape[2])).unbind(2)
    if isinstance(batch, Mapping):
        arguments = {name: value for name, value in batch.items() if name != "labels"}
        return [{**arguments, _DIRECTION: column} for column in columns]
    return [(batch[0], column) for column in columns]
