"""Cross-fitting: fits to one half of the calibration batches and judges by the other, for both orders.

Codes, shaped steps and ranks follow the metric of the calibration rows. Judged on the same rows their cost is
underestimated, more so with fewer rows; so a prediction is the mean over the folds of

    1/2 scale_judge tr(R_judge d_fit C_judge d_fit')

This is conservative: the stored values are fitted to all rows in the end, not to half of them.
"""

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.calibration.statistics import LayerStatistics


def folds(statistics: LayerStatistics) -> list[tuple[KroneckerFactors, KroneckerFactors]]:
    """Returns pairs of the curvature to fit to and the curvature to judge by.

    Args:
        statistics: Statistics of a layer, with curvature.

    Returns:
        The pairs of (even, odd) and (odd, even) batches; where there was only one batch, the pair of all rows with
        themselves.
    """
    if statistics.halves is None:
        assert statistics.curvature is not None
        return [(statistics.curvature, statistics.curvature)]
    even, odd = statistics.halves
    return [(even, odd), (odd, even)]
