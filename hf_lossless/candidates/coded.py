"""Entropy-coded grids to choose from, for one layer: the ladder of `shaped`, each with its bytes."""

import torch

from hf_lossless.calibration.statistics import LayerStatistics
from hf_lossless.candidates.proposal import Candidate
from hf_lossless.candidates.shaped import Judge, Sample, coded_bytes, ladder, try_step
from hf_lossless.candidates.sides import Sides
from hf_lossless.layers import Layer, LayerKind
from hf_lossless.plan import CodedGrid, Damping

DAMPING = Damping(rows=0.3, columns=0.1)
EMBEDDING_DAMPING = Damping(rows=0.3, columns=0.2)


def damping_of(kind: LayerKind) -> Damping:
    """The damping of the metric that shapes a layer's steps."""
    return EMBEDDING_DAMPING if kind == "embedding" else DAMPING


def propose_coded(layer: Layer, statistics: LayerStatistics, seed: int) -> list[Candidate]:
    """The shaped grids of a layer, the finest first; only those that take fewer bytes than the weight as it is.

    Args:
        layer: The layer, with real weights.
        statistics: Its statistics, with curvature; without a positive one there are none.
        seed: Of the noise that stands for feedback.
    """
    curvature = statistics.curvature
    if curvature is None or not curvature.scale > 0 or not curvature.is_finite:
        return []
    damping = damping_of(layer.kind)
    sides = Sides.of(curvature, damping)
    matrix = layer.matrix.detach().float()
    sample = Sample.of(matrix, sides, torch.Generator().manual_seed(seed))
    judge = Judge.of(curvature, sample, sides)
    out_features, in_features = matrix.shape
    candidates = []
    for step in ladder(matrix, sides):
        trial = try_step(step, sample, sides)
        cost_bytes = coded_bytes(step, trial, sample, sides)
        if cost_bytes < layer.weight.nbytes:
            coded = CodedGrid(step=step, damping=damping, shape=(out_features, in_features))
            candidates.append(Candidate(None, cost_bytes, coded=coded, expected_cost=judge.cost(step, trial)))
    return candidates
