"""The damping of layers' metrics: what is added to their diagonals, for each use.

Calibration rows span only a part of the space; damping gives errors outside of it a cost too. A damping is a share of
the mean diagonal (`calibration.curvature.damping_term`).
"""

from hf_lossless.storage.layers import LayerKind
from hf_lossless.storage.plan import Damping

FEEDBACK = 0.03
"""Damping of H in error feedback. Of 0.01, 0.03, 0.1, 0.3 and 1, tried on three models at 2 and 3 bits with 128
calibration rows, 0.03 gave the least divergence on other rows, 0.1 nearly the same."""

FEEDBACK_OF_EMBEDDINGS = 0.3
"""The same for an embedding, whose H is the second moment of gradients, not of inputs, and therefore noisier. Of
MiniLM's embedding at 2 bits, the divergence on other rows is 0.034 with 0.03, 0.023 with 0.3, 0.025 with 1, and 0.042
rounded to nearest."""

RANKS = 0.1
"""Damping of the metric of a truncated SVD. 0.01 and 0.1 gave nearly the same loss on other rows on three models, and
so did 1 on the two models it was tried on."""

SHAPED = Damping(rows=1.0, columns=0.1)
"""Damping of the metric that shapes the steps of entropy-coded grids, from the ladders in
`recipes/benchmarks/information_limit.py` with 128 calibration rows. At mild ratios all values from 0.03 to 1 are alike;
at high ratios, less damping lets feedback make errors that cost ten times as much and more on other rows."""

SHAPED_OF_EMBEDDINGS = Damping(rows=1.0, columns=0.3)
"""The same for an embedding. Its rows are counts of tokens, and their damping is a floor for tokens that the
calibration rows do not have: no token counts less than the mean."""


def feedback_damping(kind: LayerKind) -> float:
    """Returns the damping of error feedback in a layer of this kind."""
    return FEEDBACK_OF_EMBEDDINGS if kind == "embedding" else FEEDBACK


def shaped_damping(kind: LayerKind, scale: float) -> Damping:
    """Returns the damping of the metric that shapes the steps of a layer of this kind: `scale` times the default."""
    default = SHAPED_OF_EMBEDDINGS if kind == "embedding" else SHAPED
    return Damping(rows=scale * default.rows, columns=scale * default.columns)
