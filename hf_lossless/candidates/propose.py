"""Proposes the candidates of every layer of a model: grids, ranks, and sums of both."""

from collections.abc import Callable
from functools import partial

from hf_lossless.calibration.statistics import Calibration, LayerStatistics
from hf_lossless.candidates.choices import Choices, Truncation
from hf_lossless.candidates.coded import propose_coded
from hf_lossless.candidates.descent import aligned_factors, smallest_rank
from hf_lossless.candidates.factored import propose_factored, propose_sums
from hf_lossless.candidates.grids import Candidate, propose_grids, refuse_infinite
from hf_lossless.candidates.low_rank import Factors, Whitening, factorise
from hf_lossless.candidates.parallel import for_each_layer
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import KEPT_BITS


def propose(
    layers: list[Layer],
    calibration: Calibration,
    choices: Choices,
    ranks: dict[str, tuple[int, ...]],
    truncation: Truncation,
    *,
    by_derivatives: bool = False,
    damping_scale: float = 1.0,
    seed: int = 0,
) -> dict[str, list[Candidate]]:
    """Proposes candidates for every layer, several layers at a time.

    Args:
        layers: The layers, with real weights.
        calibration: Their statistics: with gradients for "descent", with curvature for "metric".
        choices: Widths, group size and kinds of grids.
        ranks: Ranks to try by layer name, see `ranks.ranks_by_layer`.
        truncation: How a matrix is truncated to a rank.
        by_derivatives: Whether the theory predicts from derivatives alone. A layer without derivatives (behind a
            rounding, an argmax or `no_grad`) can then only be kept, since the effect of a change is unknown.
        damping_scale: Factor of the default dampings of entropy-coded grids.
        seed: Seed of the noise that simulates feedback in estimates of entropy-coded grids.

    Returns:
        For each layer its grids, for "metric" each rounded to nearest and by feedback, its shaped grids, ranks and
        sums. The factors of all ranks are views of one factorisation, which takes at most twice the memory of the
        weight in float32; "descent" computes them anew for each rank.

    Raises:
        CalibrationError: A weight holds NaN or infinity.
    """

    def of_layer(layer: Layer) -> list[Candidate]:
        statistics = calibration.layers[layer.name]
        refuse_infinite(layer)
        if by_derivatives and not statistics.has_derivatives:
            return [Candidate(None, layer.weight.nbytes)]
        bits = choices.bits if "fixed" in choices.storage else tuple(set(choices.bits) & {KEPT_BITS})
        widths = propose_grids(layer, statistics, bits, choices.group_size, choices.symmetric)
        candidates = [*widths, *_with_feedback(widths)] if truncation == "metric" else widths
        if "entropy" in choices.storage:
            candidates = [*candidates, *propose_coded(layer, statistics, seed, damping_scale)]
        tried = ranks.get(layer.name)
        if tried is None or not statistics.calls:
            return candidates
        return [*candidates, *_with_factors(layer, statistics, widths, tried, choices, truncation)]

    return for_each_layer(of_layer, layers)


def _with_feedback(widths: list[Candidate]) -> list[Candidate]:
    """Copies the grids, with the same bytes, for weights that are rounded in the metric of the loss."""
    return [
        Candidate(width.grid.model_copy(update={"rounding": "feedback"}), width.cost_bytes)
        for width in widths
        if width.grid is not None
    ]


def _with_factors(
    layer: Layer,
    statistics: LayerStatistics,
    widths: list[Candidate],
    ranks: tuple[int, ...],
    choices: Choices,
    truncation: Truncation,
) -> list[Candidate]:
    """Proposes low rank for the matrix, and for the remainders of its narrow grids."""
    whitening = None
    if truncation == "metric":
        assert statistics.curvature is not None
        whitening = Whitening.of(statistics.curvature)
    factorisation = factorise(layer.matrix, whitening, largest=max(ranks))
    factors_of: Callable[[int], Factors] = factorisation.truncated
    if truncation == "descent":
        gradient = statistics.gradient
        assert gradient is not None
        factors_of = partial(aligned_factors, factorisation, matrix=layer.matrix, gradient=gradient)
        within = smallest_rank(factorisation, layer.matrix, gradient, max(ranks)) if choices.ranks == "auto" else None
        ranks = ranks if within is None else tuple(sorted({*ranks, within}))
    settings = (choices.bits, choices.group_size, choices.symmetric)
    factored = propose_factored(layer, ranks, factors_of, *settings)
    # Ranks given by number apply to factors in place of the matrix only.
    sums = propose_sums(layer, widths, whitening, *settings) if choices.ranks == "auto" else []
    return [*factored, *sums]
