"""`folds`: what is fitted to one half of the calibration batches is judged by the other half, both ways round.

Codes, shaped steps and ranks follow the metric of the calibration rows. Judged on the same rows they look better than
they are, the more so the fewer the rows; so a prediction is the mean over the folds of

    1/2 scale_judge tr(R_judge d_fit C_judge d_fit')

It errs on the safe side in one thing: what is stored in the end is fitted to all rows, and not to half of them.
"""

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.calibration.statistics import LayerStatistics


def folds(statistics: LayerStatistics) -> list[tuple[KroneckerFactors, KroneckerFactors]]:
    """Pairs of what to fit to and what to judge by.

    Args:
        statistics: Of a layer, with curvature.

    Returns:
        (even, odd) and (odd, even) batches; where there was one batch only, all rows with themselves.
    """
    if statistics.halves is None:
        assert statistics.curvature is not None
        return [(statistics.curvature, statistics.curvature)]
    even, odd = statistics.halves
    return [(even, odd), (odd, even)]
