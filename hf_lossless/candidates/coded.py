"""Proposes entropy-coded grids for one layer: the ladder of `shaped`, each with its bytes."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch

from hf_lossless.calibration.statistics import LayerStatistics
from hf_lossless.candidates.damping import shaped_damping
from hf_lossless.candidates.grids import Candidate
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.shaped import Sample, coded_bytes, ladder, try_step
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import CodedGrid


def propose_coded(layer: Layer, statistics: LayerStatistics, seed: int, damping_scale: float) -> list[Candidate]:
    """Proposes the shaped grids of a layer, finest first, that take fewer bytes than the original weight.

    Args:
        layer: The layer, with real weights.
        statistics: Its statistics, with curvature; no grids are proposed where that is missing or zero.
        seed: Seed of the noise that simulates feedback.
        damping_scale: Factor of the default dampings, see `candidates.damping_choice`.
    """
    curvature = statistics.curvature
    if curvature is None or not curvature.scale > 0 or not curvature.is_finite:
        return []
    damping = shaped_damping(layer.kind, damping_scale)
    roots = InverseRoots.of(curvature, damping)
    matrix = layer.matrix.detach().float()
    sample = Sample.of(matrix, roots, torch.Generator().manual_seed(seed))
    out_features, in_features = matrix.shape
    tried: list[tuple[float, float, float]] = []
    for step in ladder(matrix, roots):
        trial = try_step(step, sample, roots)
        tried.append((step, coded_bytes(step, trial, sample, roots), trial.cost(step, sample.share)))
    return [
        Candidate(
            None,
            round(cost_bytes),
            coded=CodedGrid(step=step, damping=damping, shape=(out_features, in_features)),
            expected_cost=cost,
        )
        for step, cost_bytes, cost in _with_steps_between(tried)
        if cost_bytes < layer.weight.nbytes
    ]


def _with_steps_between(tried: list[tuple[float, float, float]]) -> Iterator[tuple[float, float, float]]:
    """Yields steps, bytes and costs, and an interpolated triple between each two.

    Bytes are linear in log c, and costs are powers of c.
    """
    for (step, cost_bytes, cost), (next_step, next_bytes, next_cost) in pairwise(tried):
        yield step, cost_bytes, cost
        yield math.sqrt(step * next_step), (cost_bytes + next_bytes) / 2, math.sqrt(cost * next_cost)
    yield from tried[-1:]
