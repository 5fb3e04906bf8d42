"""LLC: a first-order prediction from measured slopes ("Compression for Better", Algorithm 1).

Notation, for layer i and width j: f is the mean loss over the calibration data, M the model, e the quantisation noise
of the layer's input, d that of its weight, `scale` the step of the quantisation grid.

    slope   = |f(M) - f_input(M; scale_input, i)| / scale_input                          (line 8)
    fluc    = |f(M) - f_weight(M; scale_weight, i)|                                      (line 9)
    P[i][j] = slope * ||e|| / sqrt(size(e))                                              (line 17)
              + fluc / scale_weight * ||d|| / sqrt(size(d))      where fluc >= error_max (line 20)

f_input and f_weight are measured with the noise `+-scale * |random|`, random ~ N(0, 1): "positive" or "negative"
(lines 10-15), the side that opposes the mean gradient E[p] (Eq. 7). The text of the algorithm prints the same
expression for both sides; the words around Eq. 7 make clear that they differ in sign.

The paper's P is never negative, though its aim is a loss that falls: the absolute values of lines 8 and 9 make it a
bound on how far the loss may move, and as such it is used here.
"""

from collections.abc import Callable

import torch
from torch import nn

from hf_lossless.calibration.loss import Batch, LossFunction
from hf_lossless.calibration.perturbation import (
    input_noise,
    mean_loss_share,
    one_sided_noise,
    seeded,
    weight_noise,
)
from hf_lossless.calibration.processes import sum_over_processes
from hf_lossless.calibration.statistics import Calibration, LayerStatistics
from hf_lossless.candidates.activations import activation_noise
from hf_lossless.candidates.proposal import Candidate
from hf_lossless.candidates.uniform import per_weight
from hf_lossless.layers import Layer

ERROR_MAX = 1e-4
"""Below this fluctuation of the loss a weight's noise is not counted (LLC section 5.1)."""


def predicted_loss_change(
    *,
    input_change: float,
    input_step: float,
    input_noise: float,
    weight_change: float,
    weight_step: float,
    weight_noise: float,
) -> float:
    """P[i][j] of LLC Algorithm 1, lines 16 to 21.

    Args:
        input_change: f_input - f, the measured change of the loss when the input carries noise of one step.
        input_step: scale_input; 0 where the layer has no real-valued input.
        input_noise: ||e|| / sqrt(size(e)).
        weight_change: f_weight - f.
        weight_step: scale_weight; 0 for a layer that is kept.
        weight_noise: ||d|| / sqrt(size(d)).

    Example:
        >>> round(predicted_loss_change(input_change=0.02, input_step=0.1, input_noise=0.03,
        ...                             weight_change=-0.04, weight_step=0.2, weight_noise=0.05), 6)
        0.016
    """
    slope = abs(input_change) / input_step if input_step else 0.0
    prediction = slope * input_noise
    fluctuation = abs(weight_change)
    if weight_step and fluctuation >= ERROR_MAX:
        prediction += fluctuation / weight_step * weight_noise
    return prediction


def predict(
    model: nn.Module,
    batches: list[Batch],
    layers: list[Layer],
    calibration: Calibration,
    candidates: dict[str, list[Candidate]],
    loss: LossFunction,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Predicted loss change of every candidate, by layer; 0 for keeping a layer.

    Args:
        model: In evaluation mode; as before afterwards.
        batches: All calibration batches.
        layers: The layers.
        calibration: Their statistics and f(M).
        candidates: Candidates by layer name.
        loss: Mean loss of a batch.
        seed: Seed of the noise.
        advance: Called after every measurement of a candidate.

    Returns:
        As many numbers as there are candidates, the same in every process. Costs two forward passes for each layer and
        width (one for embeddings, which have no real-valued input).
    """
    changes: dict[str, list[tuple[float, float]]] = {}
    for position, layer in enumerate(layers):
        statistics = calibration.layers[layer.name]
        changes[layer.name] = []
        for candidate in candidates[layer.name]:
            measured = _measure(model, batches, layer, position, statistics, candidate, loss, seed)
            changes[layer.name].append(measured)
            advance()
    base = calibration.loss
    predictions: dict[str, list[float]] = {}
    for layer in layers:
        shares = torch.tensor(changes[layer.name], dtype=torch.float64)
        losses = sum_over_processes(shares).tolist()
        statistics = calibration.layers[layer.name]
        predictions[layer.name] = [
            _predicted(candidate, statistics, input_loss - base, weight_loss - base)
            for candidate, (input_loss, weight_loss) in zip(candidates[layer.name], losses, strict=True)
        ]
    return predictions


def _measure(
    model: nn.Module,
    batches: list[Batch],
    layer: Layer,
    position: int,
    statistics: LayerStatistics,
    candidate: Candidate,
    loss: LossFunction,
    seed: int,
) -> tuple[float, float]:
    """This process's shares of f_input and f_weight; 0 where there is no such noise."""
    if candidate.grid is None or candidate.scales is None:
        return 0.0, 0.0
    bits = candidate.grid.bits
    input_loss = 0.0
    if statistics.inputs is not None:
        step = activation_noise(statistics.inputs, bits).step
        sign = -_sign(statistics.inputs.gradient.mean)
        generator = seeded(seed, position, bits, 0)

        def restart(batch_index: int) -> None:
            generator.manual_seed(seeded(seed, position, bits, 1 + batch_index).initial_seed())

        def draw(values: torch.Tensor) -> torch.Tensor:
            return step * one_sided_noise(values.shape, sign, generator).to(values)

        with input_noise(model, layer, draw):
            input_loss = mean_loss_share(model, batches, loss, before_batch=restart)

    matrix = layer.matrix
    sign = -_sign(statistics.weight_gradient.mean)
    noise = one_sided_noise(matrix.shape, sign, seeded(seed, position, bits, 0)).to(matrix.device)
    noise *= per_weight(candidate.scales, matrix.shape[1], candidate.grid).abs()
    with weight_noise(layer, noise):
        weight_loss = mean_loss_share(model, batches, loss)
    return input_loss, weight_loss


def _predicted(
    candidate: Candidate, statistics: LayerStatistics, input_change: float, weight_change: float
) -> float:
    if candidate.grid is None:
        return 0.0
    step = rms = 0.0
    if statistics.inputs is not None:
        noise = activation_noise(statistics.inputs, candidate.grid.bits)
        step, rms = noise.step, noise.rms
    return predicted_loss_change(
        input_change=input_change,
        input_step=step,
        input_noise=rms,
        weight_change=weight_change,
        weight_step=candidate.step,
        weight_noise=candidate.noise,
    )


def _sign(value: float) -> float:
    return 1.0 if value >= 0 else -1.0
