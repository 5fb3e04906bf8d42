"""LLC: first-order predictions from measured slopes ("Compression for Better", Algorithm 1).

Notation, for layer i and width j: f is the mean loss over the calibration data, M the model, e the quantisation noise
of the layer's input, d that of its weight, `scale` the step of the quantisation grid.

    slope   = |f(M) - f_input(M; scale_input, i)| / scale_input                          (line 8)
    fluc    = |f(M) - f_weight(M; scale_weight, i)|                                      (line 9)
    P[i][j] = slope * ||e|| / sqrt(size(e))                                              (line 17)
              + fluc / scale_weight * ||d|| / sqrt(size(d))      where fluc >= error_max (line 20)

f_input and f_weight are measured with the noise `+-scale * |random|`, random ~ N(0, 1): "positive" or "negative"
(lines 10-15), whichever sign opposes the mean gradient E[p] (Eq. 7). The algorithm prints the same expression for both;
the text around Eq. 7 makes clear that they differ in sign.

Under this theory activations stay in floating point at run time, so that e = 0 and so is the first term of P.
With `activation_noise` it is counted nevertheless, as in the paper, whose models quantise inputs to the width of the
weight; the plan then records it. Noise that does not occur at run time misleads the choice of widths, so that it is not
counted by default.

Widths whose noise is beyond the second order are refused, see `noise_limits`. Candidates with factors are predicted by
Algorithm 2, see `llc_decomposition`.

The paper's P is never negative, although the paper aims at a falling loss: with the absolute values of lines 8 and 9 it
estimates how far the loss may move in either direction, and is used as such here.
"""

import math

import torch
from torch import Tensor

from hf_lossless.calibration.perturbation import (
    input_noise,
    mean_loss_share,
    one_sided_noise,
    seeded_number,
    weight_noise,
)
from hf_lossless.calibration.statistics import LayerStatistics, Moments
from hf_lossless.candidates.activations import ActivationNoise
from hf_lossless.candidates.activations import activation_noise as activation_noise_of
from hf_lossless.candidates.grids import Candidate
from hf_lossless.data.processes import sum_over_processes
from hf_lossless.storage.grid import per_weight
from hf_lossless.storage.layers import Layer
from hf_lossless.theories import llc_decomposition
from hf_lossless.theories.noise_limits import ERROR_MAX, refuse_beyond
from hf_lossless.theories.problem import Prediction, Problem


def predicted_loss_change(
    *,
    input_change: float,
    input_step: float,
    input_noise: float,
    weight_change: float,
    weight_step: float,
    weight_noise: float,
) -> float:
    """Computes P[i][j] of LLC Algorithm 1, lines 16 to 21.

    Args:
        input_change: f_input - f, the measured change of the loss when the input carries noise of one step.
        input_step: scale_input; 0 where the layer has no real-valued input.
        input_noise: ||e|| / sqrt(size(e)) of the input's quantisation error.
        weight_change: f_weight - f, the measured change when the weight carries noise of one step.
        weight_step: scale_weight; 0 for a layer that is kept.
        weight_noise: ||d|| / sqrt(size(d)) of the weight error.

    Returns:
        The prediction; infinity where a measured loss is not finite.

    Example:
        >>> round(predicted_loss_change(input_change=0.02, input_step=0.1, input_noise=0.03,
        ...                             weight_change=-0.04, weight_step=0.2, weight_noise=0.05), 6)
        0.016
    """
    if not (math.isfinite(input_change) and math.isfinite(weight_change)):
        return math.inf
    slope = abs(input_change) / input_step if input_step else 0.0
    prediction = slope * input_noise
    fluctuation = abs(weight_change)
    if weight_step and fluctuation >= ERROR_MAX:
        prediction += fluctuation / weight_step * weight_noise
    return prediction


def predict(problem: Problem) -> dict[str, list[Prediction]]:
    """Predicts the loss change of every candidate, by layer; 0 for keeping a layer.

    Args:
        problem: Model, data, statistics and candidates; with gradients where there are candidates with factors.

    Returns:
        One prediction for each candidate, the same in every process. They cost one forward pass for each layer and
        width, one more with `activation_noise`, and those of Algorithm 2 for candidates with factors.
    """
    predictions: dict[str, list[Prediction]] = {}
    for position, layer in enumerate(problem.layers):
        candidates = problem.candidates[layer.name]
        widths = iter(_predict_widths(problem, position, layer, [one for one in candidates if one.low_rank is None]))
        factored = [one for one in candidates if one.low_rank is not None]
        ranks = iter(llc_decomposition.predict_layer(problem, layer, factored) if factored else ())
        predictions[layer.name] = [next(widths if one.low_rank is None else ranks) for one in candidates]
    return predictions


def _predict_widths(problem: Problem, position: int, layer: Layer, candidates: list[Candidate]) -> list[Prediction]:
    """Runs Algorithm 1 for one layer."""
    statistics = problem.calibration.layers[layer.name]
    noises = [_activation_noise(statistics, candidate, problem.activation_noise) for candidate in candidates]
    seed = seeded_number(problem.seed, position)  # the same |random| at every width, so that only the steps differ
    shares = []
    for candidate, noise in zip(candidates, noises, strict=True):
        shares.append(
            (
                _loss_under_input_noise(problem, layer, statistics, noise, seed),
                _loss_under_weight_noise(problem, layer, statistics, candidate, seed),
            )
        )
        problem.advance()
    losses = sum_over_processes(torch.tensor(shares, dtype=torch.float64)).tolist()
    predictions = [
        Prediction(
            predicted_loss_change(
                input_change=input_loss - problem.calibration.loss,
                input_step=noise.step,
                input_noise=noise.rms,
                weight_change=weight_loss - problem.calibration.loss,
                weight_step=candidate.step,
                weight_noise=candidate.noise,
            )
        )
        for candidate, noise, (input_loss, weight_loss) in zip(candidates, noises, losses, strict=True)
    ]
    return refuse_beyond(layer, candidates, predictions)


def _activation_noise(statistics: LayerStatistics, candidate: Candidate, counted: bool) -> ActivationNoise:
    if not counted or candidate.grid is None or statistics.inputs is None:
        return ActivationNoise(step=0.0, rms=0.0)
    return activation_noise_of(statistics.inputs, candidate.grid.bits)


def _loss_under_input_noise(
    problem: Problem,
    layer: Layer,
    statistics: LayerStatistics,
    noise: ActivationNoise,
    seed: int,
) -> float:
    """Measures this process's share of f_input; 0 where no noise is counted."""
    if not noise.step or statistics.inputs is None:
        return 0.0
    sign = _opposing_sign(statistics.inputs.gradient)
    generator = torch.Generator()

    def draw(values: Tensor) -> Tensor:
        return noise.step * one_sided_noise(values.shape, sign, generator).to(values)

    with input_noise(problem.model, layer, draw):
        return mean_loss_share(
            problem.model,
            problem.batches,
            problem.loss,
            before_batch=lambda index: generator.manual_seed(seeded_number(seed, index)),
        )


def _loss_under_weight_noise(
    problem: Problem,
    layer: Layer,
    statistics: LayerStatistics,
    candidate: Candidate,
    seed: int,
) -> float:
    """Measures this process's share of f_weight; 0 for a layer that is kept."""
    if candidate.grid is None or candidate.scales is None:
        return 0.0
    matrix = layer.matrix
    generator = torch.Generator().manual_seed(seed)
    noise = one_sided_noise(matrix.shape, _opposing_sign(statistics.weight_gradient), generator).to(matrix.device)
    noise *= per_weight(candidate.scales, matrix.shape[1], candidate.grid).abs()
    with weight_noise(layer, noise):
        return mean_loss_share(problem.model, problem.batches, problem.loss)


def _opposing_sign(gradient: Moments) -> float:
    """Returns the sign of the noise that opposes E[p] (Eq. 7); negative where E[p] is only rounding error.

    Before a layer norm or a softmax the mean is zero by construction, and its computed sign is arbitrary.
    """
    return 1.0 if gradient.mean < -1e-6 * math.sqrt(gradient.variance) else -1.0
