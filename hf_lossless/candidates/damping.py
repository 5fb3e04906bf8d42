"""How much is added to the diagonals of layers' metrics, for each use of them.

Calibration rows excite a part of the space only; with the damping, an error in the rest costs something too. A damping
is a share of the mean diagonal (`calibration.curvature.damping_term`).
"""

from hf_lossless.storage.layers import LayerKind
from hf_lossless.storage.plan import Damping

FEEDBACK = 0.03
"""Of H in error feedback. Of 0.01, 0.03, 0.1, 0.3 and 1, tried on three models at 2 and 3 bits with 128 calibration
rows, 0.03 gave the least divergence on other rows, 0.1 nearly the same."""

FEEDBACK_OF_EMBEDDINGS = 0.3
"""The same for an embedding, whose H is the second moment of gradients and not of inputs, and noisier for it. MiniLM's,
at 2 bits: divergence on other rows 0.034 with 0.03, 0.023 with 0.3, 0.025 with 1; to nearest 0.042."""

RANKS = 0.1
"""Of the metric that a matrix is cut to a rank in. 0.01 and 0.1 gave much the same loss of other rows on three models,
and so did 1 on the two of them that it was tried on."""

SHAPED = Damping(rows=1.0, columns=0.1)
"""Of the metric that shapes the steps of entropy-coded grids, of the ladders in
`recipes/benchmarks/information_limit.py`, with 128 calibration rows. At mild ratios all from 0.03 to 1 do alike; at
high ones, less damping lets feedback bring errors that other rows object to, ten times and more."""

SHAPED_OF_EMBEDDINGS = Damping(rows=1.0, columns=0.3)
"""The same for an embedding. Its rows are counts of tokens, and their damping is the floor of rate for tokens that the
calibration rows do not have: none counts for less than the mean."""


def feedback_damping(kind: LayerKind) -> float:
    """Gives the damping of error feedback in a layer of this kind."""
    return FEEDBACK_OF_EMBEDDINGS if kind == "embedding" else FEEDBACK


def shaped_damping(kind: LayerKind, scale: float) -> Damping:
    """Gives the damping of the metric that shapes a layer's steps: so many times the default."""
    default = SHAPED_OF_EMBEDDINGS if kind == "embedding" else SHAPED
    return Damping(rows=scale * default.rows, columns=scale * default.columns)
