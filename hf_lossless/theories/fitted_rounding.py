"""Predicts the cost of error feedback, judged on other rows than those that it was fitted to.

Feedback moves a layer's error into the directions with the least variance on the calibration rows. Judged on the same
rows its cost is underestimated, more so with fewer rows. So the codes are fitted to the metric of one half of the
calibration batches and judged by that of the other half, and the mean over both orders is taken (see `cross_fit`).

Of a layer with more than S rows a sample is rounded, drawn with the probabilities R_oo / tr R, and

    tr(R d C d')  ~  sum_o R_oo (d C d')_oo  ~  tr R / S sum_a (d C d')_aa

which neglects that rows with correlated gradients may have correlated errors. The left-hand side was 0.98 to 3.8 times
the right-hand side over the layers of a ViT and a ResNet at 2 bits, 1.7 times in the median. The pairs of sampled rows
would give an unbiased estimate of the difference, but with a standard deviation as large as its value. A layer of at
most S rows is rounded in full. So predicting a candidate takes a fraction of the time of rounding the layer, with one
round of descent instead of two, and layers of one width are fitted in one batch.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.candidates.damping import feedback_damping
from hf_lossless.candidates.feedback import quantise_in_metric
from hf_lossless.storage.grid import dequantise
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import Grid
from hf_lossless.theories.cross_fit import folds
from hf_lossless.theories.problem import Problem

SAMPLED_ROWS = 48
"""S: rows of a layer that are rounded."""

_ROUNDS = 1
"""Rounds of scales and descent: a second one lowers the cost by a few per cent."""

_LARGEST_BATCH = 2**25
"""Most numbers in the metrics of a batch: 128 MiB."""


@dataclass(frozen=True)
class _Fold:
    """A layer's sampled rows, the metric they are fitted to, and the curvature that judges them."""

    name: str
    rows: Tensor
    pairs: Tensor
    grids: list[Grid]
    fit: Tensor
    judge: KroneckerFactors
    damping: float


def feedback_changes(problem: Problem) -> dict[str, dict[Grid, float]]:
    """Predicts the change of the loss for every grid that is rounded by feedback, by layer.

    Args:
        problem: The problem, with curvature in its statistics.
    """
    generator = torch.Generator().manual_seed(problem.seed)
    batches = defaultdict(list)
    for layer in problem.layers:
        for fold in _folds(problem, layer, generator):
            batches[_key(fold)].append(fold)
    found: dict[str, dict[Grid, list[float]]] = defaultdict(lambda: defaultdict(list))
    for alike in batches.values():
        at_once = max(1, _LARGEST_BATCH // alike[0].fit.numel())
        for start in range(0, len(alike), at_once):
            part = alike[start : start + at_once]
            for fold, changes in zip(part, _changes(part), strict=True):
                for grid, change in zip(fold.grids, changes, strict=True):
                    found[fold.name][grid].append(change)
    return {
        name: {grid: sum(changes) / len(changes) for grid, changes in of_grid.items()}
        for name, of_grid in found.items()
    }


def _folds(problem: Problem, layer: Layer, generator: torch.Generator) -> list[_Fold]:
    grids = [
        candidate.grid
        for candidate in problem.candidates[layer.name]
        if candidate.kind == "grid" and candidate.grid is not None and candidate.grid.rounding == "feedback"
    ]
    if not grids:
        return []
    statistics = problem.calibration.layers[layer.name]
    curvature = statistics.curvature
    assert curvature is not None
    indices, pairs = _sample(curvature.rows, generator)
    rows = layer.matrix.detach()[indices].float()
    return [
        _Fold(layer.name, rows, pairs, grids, fit.columns, judge, feedback_damping(layer.kind))
        for fit, judge in folds(statistics)
    ]


def _sample(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws indices of rows, and computes the weight of each pair of them in `tr(R d C d')`, [S, S] float64."""
    weights = (rows if rows.ndim == 1 else rows.diagonal()).double().cpu()
    if len(weights) <= SAMPLED_ROWS or not weights.any():
        indices = torch.arange(min(len(weights), SAMPLED_ROWS)).to(rows.device)
        return indices, _of_rows(rows, indices)
    indices = torch.multinomial(weights, SAMPLED_ROWS, replacement=True, generator=generator)
    pairs = torch.eye(SAMPLED_ROWS, dtype=torch.float64) * weights.sum() / SAMPLED_ROWS
    return indices.to(rows.device), pairs.to(rows.device)


def _of_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """Returns the part of R that belongs to some rows."""
    return (rows[indices].diag() if rows.ndim == 1 else rows[indices][:, indices]).double()


def _key(fold: _Fold) -> tuple[object, ...]:
    """Returns the properties that the members of a batch share."""
    first = fold.grids[0]
    same = (first.group_size, first.symmetric, first.scale_dtype, len(fold.grids), fold.damping)
    return (tuple(fold.rows.shape), fold.fit.ndim, fold.fit.device, *same)


def _changes(folds: list[_Fold]) -> list[list[float]]:
    """Computes `1/2 scale tr(R d C d')` of every grid of every fold."""
    matrices = torch.stack([fold.rows for fold in folds])
    columns = torch.stack([fold.fit for fold in folds])
    grids = [fold.grids for fold in folds]
    results = quantise_in_metric(matrices, grids, columns, folds[0].damping, _ROUNDS)
    changes = []
    for fold, of_fold in zip(folds, results, strict=True):
        metric = fold.judge.columns
        for_grids = []
        for quantised in of_fold:
            error = dequantise(quantised.codes, quantised.scales, quantised.zeros, quantised.grid) - fold.rows
            weighted = error * metric if metric.ndim == 1 else error @ metric
            costs = fold.pairs * (weighted @ error.mT).double()
            for_grids.append(0.5 * fold.judge.scale * costs.sum().item())
        changes.append(for_grids)
    return changes
