"""LoD: the first-order sign where statistics decide it, a measurement where they do not (LoD, appendix A.2).

For a layer with mean gradient p = dl/dw and a candidate's error e, both seen as k independent draws, the first-order
change X = <p, e> has (A.2.2)

    E[X] = k E[p] E[e],   Var(X) = k V,   V = Var(p) Var(e) + Var(p) E[e]^2 + Var(e) E[p]^2,
    SNR  = sqrt(k) |E[p] E[e]| / sqrt(V),
    P(X >= 0) <= V / (k E[p]^2 E[e]^2) = 1 / SNR^2   (Chebyshev),   ~ Phi(-SNR)   (central limit),   for E[X] < 0.

Where the Chebyshev bound is small, the analytic regime holds and the candidate is taken at its first-order word, the
inner product `<p, e>` itself. Where the bound says nothing (unbiased rounding has E[e] ~ 0), "a small empirical
forward-check on calibration data" decides. Which of the two it was goes into the plan.

A candidate that leaves the neighbourhood is refused, as 2 bits for layer 4 in Table 1: one whose loss change is above
the tolerance tau = 1e-2 (nats). Candidates of low rank must also stay within tau element by element (A.2.1, see
`candidates.descent`). Where every candidate of a layer is refused the one with the least change is left: the text calls
this best effort. The paper's example in A.2.2 has E[p] E[e] > 0 although it bounds P(X >= 0), which only makes sense
for a negative mean; the formulas above are used with that sign.

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
"""tau as a change of the mean loss, in nats: more leaves the neighbourhood."""

SURE = 0.05
"""Largest Chebyshev bound at which the first-order sign counts as decided."""

_LARGEST_SNR = 1e9
"""Stands for infinity: a plan is JSON."""


def regime_test(gradient: Tensor, error: Tensor) -> Regime:
    """Measures E[p], E[e], Var(p), Var(e) over all weights, and whether Chebyshev's bound decides <p, e>'s sign.

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
    snr = float(f"{min(snr, _LARGEST_SNR):.3g}")  # what follows is noise, and costs bytes
    return Regime(snr=snr, verdict="analytic" if snr**2 * SURE >= 1 else "measured")


def predict(problem: Problem) -> dict[str, list[Prediction]]:
    """Predicted loss change of every candidate with its regime, by layer; 0 for keeping a layer.

    Args:
        problem: With gradients in its statistics.

    Returns:
        Signed changes; infinity for candidates outside the neighbourhood. One forward pass for every candidate that the
        statistics do not decide.
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
    """Refuses what leaves the neighbourhood; the least change stays where that would be everything."""
    inside = [one if one.loss_change <= LOSS_TOLERANCE else Prediction(math.inf) for one in found]
    if any(one.usable for one in inside):
        return inside
    least = min((one.loss_change for one in found if one.usable), default=math.inf)
    return [one if one.loss_change == least else Prediction(math.inf) for one in found]
