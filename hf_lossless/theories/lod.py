"""LoD: the first-order prediction where statistics decide its sign, else a measurement (LoD, appendix A.2).

For a layer with mean gradient p = dl/dw and a candidate's error e, both seen as k independent draws, the first-order
change X = <p, e> has (A.2.2)

    E[X] = k E[p] E[e],   Var(X) = k V,   V = Var(p) Var(e) + Var(p) E[e]^2 + Var(e) E[p]^2,
    SNR  = sqrt(k) |E[p] E[e]| / sqrt(V),
    P(X >= 0) <= V / (k E[p]^2 E[e]^2) = 1 / SNR^2   (Chebyshev),   ~ Phi(-SNR)   (central limit),   for E[X] < 0.

Where the Chebyshev bound is small, the analytic regime holds and the prediction is the first-order term `<p, e>`
itself. Where the bound proves nothing (unbiased rounding has E[e] ~ 0), "a small empirical forward-check on calibration
data" decides. The plan records which of the two applied.

A candidate outside of the neighbourhood, with a loss change above the tolerance tau = 1e-2 (nats), is refused, as 2
bits for layer 4 in Table 1. Candidates of low rank must also stay within tau element by element (A.2.1, see
`candidates.descent`). Where every candidate of a layer would be refused, the one with the least change remains: the
text calls this best effort. The paper's example in A.2.2 has E[p] E[e] > 0 although it bounds P(X >= 0), which only
makes sense for a negative mean; the formulas above are used with that sign.

Changes keep their sign: LoD's claim is that the loss may fall.
"""

import math

from torch import Tensor

from hf_lossless.candidates.descent import TOLERANCE
from hf_lossless.candidates.grids import Candidate
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import Regime
from hf_lossless.theories.llc_decomposition import within_neighbourhood
from hf_lossless.theories.problem import Prediction, Problem, measured_change

LOSS_TOLERANCE = 1e-2
"""tau as the largest change of the mean loss inside the neighbourhood, in nats."""

SURE = 0.05
"""Largest Chebyshev bound at which the first-order sign counts as decided."""

_LARGEST_SNR = 1e9
"""Written in place of infinity, since a plan is JSON."""


def regime_test(gradient: Tensor, error: Tensor) -> Regime:
    """Computes the SNR over all weights, and whether Chebyshev's bound decides the sign of <p, e>.

    Args:
        gradient: p [out, in].
        error: e [out, in].

    Example:
        >>> import torch
        >>> regime_test(torch.full((100,), 0.1), torch.linspace(-2e-3, -1e-3, 100)).verdict
        'analytic'
        >>> regime_test(torch.full((100,), 0.1), torch.linspace(-1e-3, 1.1e-3, 100)).verdict
        'measured'
    """
    p, e = gradient.double(), error.double()
    mean_p, mean_e = p.mean().item(), e.mean().item()
    variance_p, variance_e = p.var(correction=0).item(), e.var(correction=0).item()
    variance = variance_p * variance_e + variance_p * mean_e**2 + variance_e * mean_p**2
    signal = abs(mean_p * mean_e)
    snr = math.sqrt(p.numel()) * signal / math.sqrt(variance) if variance else signal and math.inf
    snr = float(f"{min(snr, _LARGEST_SNR):.3g}")  # more digits are noise, and cost bytes
    return Regime(snr=snr, verdict="analytic" if snr**2 * SURE >= 1 else "measured")


def predict(problem: Problem) -> dict[str, list[Prediction]]:
    """Predicts the loss change of every candidate with its regime, by layer; 0 for keeping a layer.

    Args:
        problem: The problem, with gradients in its statistics.

    Returns:
        Signed changes; infinity for candidates outside the neighbourhood. Every candidate that the statistics do not
        decide costs one forward pass.
    """
    predictions = {}
    for layer in problem.layers:
        found = []
        for candidate in problem.candidates[layer.name]:
            found.append(_predict(problem, layer, candidate))
            problem.advance()
        predictions[layer.name] = _neighbourhood(found)
    return predictions


def _predict(problem: Problem, layer: Layer, candidate: Candidate) -> Prediction:
    if candidate.kind == "kept":
        return Prediction(0.0)
    gradient = problem.calibration.layers[layer.name].gradient
    assert gradient is not None
    error = candidate.error(layer.matrix)
    if candidate.kind == "low_rank" and error.abs().max() > TOLERANCE:
        return Prediction(math.inf)
    regime = regime_test(gradient, error)
    if regime.verdict == "analytic" and within_neighbourhood(error):
        return Prediction((gradient.double() * error.double()).sum().item(), regime)
    measured = Regime(snr=regime.snr, verdict="measured")
    return Prediction(measured_change(problem, layer, error), measured)


def _neighbourhood(found: list[Prediction]) -> list[Prediction]:
    """Refuses predictions outside of the neighbourhood, except the least change where that would be all."""
    inside = [one if one.loss_change <= LOSS_TOLERANCE else Prediction(math.inf) for one in found]
    if any(one.usable for one in inside):
        return inside
    least = min((one.loss_change for one in found if one.usable), default=math.inf)
    return [one if one.loss_change == least else Prediction(math.inf) for one in found]
