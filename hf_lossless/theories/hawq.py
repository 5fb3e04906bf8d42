"""HAWQ: the trace of the Hessian times the squared error, the baseline (Dong et al., HAWQ-V2, NeurIPS 2020).

Notation: layer l has n_l weights, H_ll is its block of the Hessian of the mean loss, d the error of its stored weight.

    Omega = sum_l  tr(H_ll) / n_l * ||d_l||^2        (HAWQ-V2, section 3.2: the "average Hessian trace")
    predicted loss change of a candidate = 1/2 tr(H_ll) / n_l * ||d||^2

HAWQ-V2 has no 1/2, since there Omega only ranks configurations. With it the prediction is the expected loss change of
an error of that length in a random direction, at a minimum of the loss, and is comparable with other theories'.

The trace is Hutchinson's estimate on about 32 rows of the calibration data, layer by layer: one product could serve all
layers, but on a ViT of 6 layers 32 such probes have a median error of 1.2 times the trace and half of the estimates are
negative, while the 3 probes for each layer that cost as much have 0.5. A trace may be negative where the model is not
at a minimum of the loss on these rows; HAWQ assumes that it is, and such a layer counts as insensitive: its trace is
taken as 0, never as a gain.
"""

import logging
import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

from hf_lossless.calibration.hessian import TraceEstimate, block_traces, hessian, sub_sample
from hf_lossless.calibration.perturbation import seeded_number
from hf_lossless.candidates.grids import Candidate
from hf_lossless.storage.layers import Layer
from hf_lossless.theories.noise_limits import refuse_beyond, refuse_flat
from hf_lossless.theories.problem import Prediction, Problem, layers_with_a_choice, predictions_of_kept

MAX_ROWS = 32
"""Rows of the calibration data that are differentiated twice; their graphs are in memory together."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TraceSettings:
    """Accuracy and cost of the trace estimates.

    Attributes:
        tolerance: Standard error, relative to a layer's trace, at which its estimation stops.
        min_probes: Least number of probes.
        max_probes: Largest number of probes; the estimate is used then even if it misses the tolerance.
        max_rows: Rows of calibration data.
    """

    tolerance: float = 0.2
    min_probes: int = 8
    max_probes: int = 16
    max_rows: int = MAX_ROWS


def predicted_loss_change(trace: float, num_weights: int, squared_error: float) -> float:
    """Computes the predicted loss change `1/2 max(tr H, 0) / n ||d||^2`.

    Args:
        trace: tr H_ll, nats per squared unit of weight.
        num_weights: n_l.
        squared_error: ||d||^2.

    Example:
        >>> predicted_loss_change(trace=8.0, num_weights=4, squared_error=0.5)
        0.5
        >>> predicted_loss_change(trace=-8.0, num_weights=4, squared_error=0.5)
        0.0
    """
    return 0.5 * max(trace, 0.0) / num_weights * squared_error


def predict(problem: Problem) -> dict[str, list[Prediction]]:
    """Predicts the loss change of every candidate, by layer; 0 for keeping a layer.

    Args:
        problem: Model, data, statistics and candidates.

    Returns:
        As many predictions as there are candidates, the same in every process; infinity for noise beyond the second
        order and where every second derivative is zero (see `noise_limits`). Costs one forward-backward pass over
        `TraceSettings.max_rows` rows, and for each layer and probe half of one on average.

    Raises:
        CalibrationError: The loss has no second derivative, or it is not finite.
    """
    predictions: dict[str, list[Prediction]] = {}
    traces: dict[str, TraceEstimate] = {}
    with closing(_each_trace(problem, TraceSettings())) as found:  # restores the model's flags also after an error
        for layer, estimate in found:
            traces[layer.name] = estimate
            predictions[layer.name] = []
            for candidate in problem.candidates[layer.name]:
                predictions[layer.name].append(_judge(estimate.trace, candidate, layer))
                problem.advance()
            predictions[layer.name] = refuse_beyond(layer, problem.candidates[layer.name], predictions[layer.name])
    _log(traces)
    flat = [name for name, estimate in traces.items() if estimate.trace == 0 == estimate.standard_error]
    return refuse_flat(problem, predictions, flat) | predictions_of_kept(problem)


def estimate_traces(problem: Problem, settings: TraceSettings | None = None) -> dict[str, TraceEstimate]:
    """Estimates the trace tr H_ll, with standard error, of every layer with a candidate beside keeping it.

    Args:
        problem: Model, data and candidates.
        settings: Accuracy and cost of the estimates; None: the defaults.

    Returns:
        Estimates by layer name.

    Raises:
        CalibrationError: The loss has no second derivative, or it is not finite.
    """
    traces = {layer.name: estimate for layer, estimate in _each_trace(problem, settings or TraceSettings())}
    _log(traces)
    return traces


def _each_trace(problem: Problem, settings: TraceSettings) -> Generator[tuple[Layer, TraceEstimate], None, None]:
    layers = layers_with_a_choice(problem)
    batches = sub_sample(problem.batches, settings.max_rows) if layers else []
    with hessian(problem.model, batches, layers, problem.loss) as product:
        for position, layer in enumerate(layers):
            estimates = block_traces(
                product,
                {layer.name: layer.matrix.detach()},
                tolerance=settings.tolerance,
                min_probes=settings.min_probes,
                max_probes=settings.max_probes,
                seed=seeded_number(problem.seed, position),
            )
            yield layer, estimates[layer.name]


def _judge(trace: float, candidate: Candidate, layer: Layer) -> Prediction:
    if candidate.kind == "kept":
        return Prediction(0.0)
    matrix = layer.matrix.detach()
    squared_error = candidate.error(matrix).double().square().sum().item()
    change = predicted_loss_change(trace, matrix.numel(), squared_error)
    return Prediction(change if math.isfinite(change) else math.inf)


def _log(traces: dict[str, TraceEstimate]) -> None:
    _logger.info(
        "HAWQ: %d Hessian-vector products; %d of %d traces with a larger error than asked; %d negative, taken as 0",
        sum(estimate.num_probes for estimate in traces.values()),
        sum(not estimate.converged for estimate in traces.values()),
        len(traces),
        sum(estimate.trace < 0 for estimate in traces.values()),
    )
