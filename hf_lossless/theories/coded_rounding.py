"""What an entropy-coded grid costs, judged on other rows than those that shaped it.

Steps and feedback follow the metric of the calibration rows, and what they save in its weak directions other rows may
ask back. So a layer's grids are made for one half of the calibration batches and judged by the curvature of the other,
both ways round, and the mean is taken, as for `fitted_rounding` and `truncation`. Each is tried on some of the layer's
rows (see `candidates.shaped`).
"""

import torch

from hf_lossless.calibration.statistics import LayerStatistics
from hf_lossless.candidates.proposal import Candidate
from hf_lossless.candidates.shaped import Judge, Sample, try_step
from hf_lossless.candidates.sides import Sides
from hf_lossless.layers import Layer
from hf_lossless.plan import CodedGrid


def coded_changes(
    layer: Layer, candidates: list[Candidate], statistics: LayerStatistics, seed: int
) -> dict[CodedGrid, float]:
    """The predicted change of the loss for every entropy-coded grid of a layer.

    Args:
        layer: The layer.
        candidates: Its candidates, of all kinds.
        statistics: Its statistics, with curvature.
        seed: Of the noise that stands for feedback.
    """
    grids = [candidate.coded for candidate in candidates if candidate.coded is not None]
    if not grids:
        return {}
    assert statistics.curvature is not None
    if statistics.halves is None or not all(half.scale > 0 for half in statistics.halves):
        return {one.coded: one.expected_cost for one in candidates if one.coded is not None}
    even, odd = statistics.halves
    matrix = layer.matrix.detach().float()
    changes = dict.fromkeys(grids, 0.0)
    for fit, judge in ((even, odd), (odd, even)):
        sides = Sides.of(fit, grids[0].damping)
        sample = Sample.of(matrix, sides, torch.Generator().manual_seed(seed))
        judged = Judge.of(judge, sample, sides)
        for grid in grids:
            trial = try_step(grid.step, sample, sides)
            changes[grid] += judged.cost(grid.step, trial) / 2
    return changes
