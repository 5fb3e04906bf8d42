"""Predicts the cost of entropy-coded grids, judged on other rows than those that shaped them.

Steps and feedback follow the metric of the calibration rows, and errors in its weak directions cost more on other rows.
This is measured by cross-fitting (`cross_fit`): a layer's grid is made for one half of the calibration batches and
judged by the curvature of the other half, for both orders. The result is one factor over the costs in the layers'
damped metrics,

    kappa = sum_layers cost_judged / sum_layers cost_damped,

with each layer at the step nearest to `REFERENCE_BITS`. The prediction of every candidate is kappa times its cost in
its damped metric. So the ratios of the layers' costs are those of reverse water-filling, and nearly the same number c
is chosen for all layers. A factor for each layer, from the other half or from its undamped metric, gave MiniLM at a
ratio of 12 a divergence of 0.018 on other rows, where one c for all layers gave 0.010.
"""

import torch

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.calibration.statistics import LayerStatistics
from hf_lossless.candidates.grids import Candidate
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.parallel import for_each_layer
from hf_lossless.candidates.shaped import Judge, Sample, try_step
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import CodedGrid
from hf_lossless.theories.cross_fit import folds
from hf_lossless.theories.problem import Problem

REFERENCE_BITS = 2.5
"""Bits per weight at which layers are judged."""


def coded_changes(problem: Problem) -> dict[str, dict[CodedGrid, float]]:
    """Predicts the change of the loss for every entropy-coded grid, by layer.

    Args:
        problem: The problem, with curvature in its statistics.
    """
    coded = {
        layer.name: [candidate for candidate in problem.candidates[layer.name] if candidate.coded is not None]
        for layer in problem.layers
    }
    layers = [layer for layer in problem.layers if coded[layer.name]]
    costs = for_each_layer(
        lambda layer: _damped_and_judged(
            layer, _reference(layer, coded[layer.name]), problem.calibration.layers[layer.name], problem.seed
        ),
        layers,
    )
    damped, judged = (sum(pair[place] for pair in costs.values()) for place in range(2))
    factor = judged / damped if damped > 0 else 1.0
    return {
        name: {one.coded: factor * one.expected_cost for one in group if one.coded is not None}
        for name, group in coded.items()
    }


def _reference(layer: Layer, candidates: list[Candidate]) -> Candidate:
    size = layer.matrix.numel()
    return min(candidates, key=lambda one: abs(8 * one.cost_bytes / size - REFERENCE_BITS))


def _damped_and_judged(
    layer: Layer, candidate: Candidate, statistics: LayerStatistics, seed: int
) -> tuple[float, float]:
    """Computes a candidate's cost in its damped metric and on other rows; without halves the former for both."""
    grid = candidate.coded
    assert grid is not None
    if statistics.halves is None or not all(half.scale > 0 for half in statistics.halves):
        return candidate.expected_cost, candidate.expected_cost
    judged = [_judged(layer, grid, fit, judge, seed) for fit, judge in folds(statistics)]
    return candidate.expected_cost, sum(judged) / len(judged)


def _judged(layer: Layer, grid: CodedGrid, fit: KroneckerFactors, judge: KroneckerFactors, seed: int) -> float:
    roots = InverseRoots.of(fit, grid.damping)
    sample = Sample.of(layer.matrix, roots, torch.Generator().manual_seed(seed))
    return Judge.of(judge, sample, roots).cost(grid.step, try_step(grid.step, sample, roots))
