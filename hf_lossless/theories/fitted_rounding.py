"""What error feedback costs, judged on other rows than those that it was fitted to.

Feedback pushes a layer's error into the directions that the calibration rows excite least. Judged on the same rows it
looks better than it is, the more so the fewer they are. So the codes are fitted to the metric of one half of the
calibration batches and judged by that of the other half, both ways round, and the mean is taken (see `truncation`).

Rows of a layer are rounded independently of each other, and their errors are uncorrelated, so that

    1/2 scale tr(R d C d')  ~  1/2 scale sum_o R_oo (d C d')_oo

and a sample of the rows, drawn with the probabilities R_oo / tr R, gives it without bias. That makes a candidate cost
a fraction of what rounding the layer costs, and layers of one width are fitted in one batch.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.candidates.feedback import damping_of, quantise_in_metric
from hf_lossless.candidates.uniform import dequantise
from hf_lossless.layers import Layer
from hf_lossless.plan import Grid
from hf_lossless.theories.problem import Problem

SAMPLED_ROWS = 64
"""Rows of a layer that are rounded; the cost of rows differs by a third or so, which leaves an error of 5 %."""

_LARGEST_BATCH = 2**25
"""Numbers in the metrics of a batch: 128 MiB."""


@dataclass(frozen=True)
class _Fold:
    """A layer's sampled rows, what they are fitted to, and what judges them."""

    name: str
    rows: Tensor
    shares: Tensor
    grids: list[Grid]
    fit: Tensor
    judge: KroneckerFactors
    damping: float


def feedback_changes(problem: Problem) -> dict[str, dict[Grid, float]]:
    """The predicted change of the loss for every grid that is rounded by feedback, by layer.

    Args:
        problem: With curvature in its statistics.
    """
    generator = torch.Generator().manual_seed(problem.seed)
    batches = defaultdict(list)
    for layer in problem.layers:
        for fold in _folds(problem, layer, generator):
            batches[_key(fold)].append(fold)
    found: dict[str, dict[Grid, list[float]]] = defaultdict(lambda: defaultdict(list))
    for folds in batches.values():
        at_once = max(1, _LARGEST_BATCH // folds[0].fit.numel())
        for start in range(0, len(folds), at_once):
            part = folds[start : start + at_once]
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
    indices, shares = _sample(curvature.rows, generator)
    rows = layer.matrix.detach()[indices].float()
    even, odd = statistics.halves or (curvature, curvature)
    pairs = [(even, odd), (odd, even)] if statistics.halves else [(curvature, curvature)]
    return [_Fold(layer.name, rows, shares, grids, fit.columns, judge, damping_of(layer.kind)) for fit, judge in pairs]


def _sample(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of rows, and the share of the whole that each stands for."""
    weights = (rows if rows.ndim == 1 else rows.diagonal()).double().cpu()
    if len(weights) <= SAMPLED_ROWS or not weights.any():
        indices = torch.arange(min(len(weights), SAMPLED_ROWS))
        return indices.to(rows.device), (weights[indices] / weights.sum().clamp(min=1e-30)).to(rows.device)
    indices = torch.multinomial(weights, SAMPLED_ROWS, replacement=True, generator=generator)
    return indices.to(rows.device), torch.full((SAMPLED_ROWS,), 1 / SAMPLED_ROWS).double().to(rows.device)


def _key(fold: _Fold) -> tuple[object, ...]:
    """What the members of a batch have in common."""
    first = fold.grids[0]
    same = (first.group_size, first.symmetric, first.scale_dtype, len(fold.grids), fold.damping)
    return (tuple(fold.rows.shape), fold.fit.ndim, fold.fit.device, *same)


def _changes(folds: list[_Fold]) -> list[list[float]]:
    """`1/2 scale tr(R) sum_s share_s d_s C d_s'` of every grid of every fold."""
    matrices = torch.stack([fold.rows for fold in folds])
    columns = torch.stack([fold.fit for fold in folds])
    results = quantise_in_metric(matrices, [fold.grids for fold in folds], columns, folds[0].damping)
    changes = []
    for fold, of_fold in zip(folds, results, strict=True):
        metric, num_rows = fold.judge.columns, len(fold.judge.rows)
        for_grids = []
        for quantised in of_fold:
            error = dequantise(quantised.codes, quantised.scales, quantised.zeros, quantised.grid) - fold.rows
            weighted = error * metric if metric.ndim == 1 else error @ metric
            costs = (weighted * error).sum(1, dtype=torch.float64)
            for_grids.append(0.5 * fold.judge.scale * num_rows * float(fold.shares @ costs))  # tr R = its sides
        changes.append(for_grids)
    return changes
