"""The noise sizes up to which the theories hold (LLC section 3), and the refusal of candidates beyond them.

LLC names two sizes of weight noise, from its Fig. 1: up to 8e-3 the first order dominates, up to 2e-1 the second order
must be added, and beyond "higher-order terms should not be omitted", which no theory here has. Sizes are root mean
squares in the weights' own unit, as in the paper; `hf-lossless neighbourhood` measures them on a model.
"""

import logging
import math

from torch import Tensor

from hf_lossless.candidates.grids import Candidate
from hf_lossless.data.processes import process_state
from hf_lossless.storage.layers import Layer
from hf_lossless.theories.problem import Prediction, Problem

_logger = logging.getLogger(__name__)

FIRST_ORDER = 8e-3
"""Largest root mean square of weight noise up to which the first order dominates."""

SECOND_ORDER = 2e-1
"""Largest root mean square up to which the first and second order explain the loss."""

ERROR_MAX = 1e-4
"""Fluctuations of the loss below this are ignored (LLC section 5.1)."""


def rms(values: Tensor) -> float:
    """Computes the root mean square over all elements.

    Example:
        >>> import torch
        >>> rms(torch.tensor([3.0, 4.0, 0.0, 0.0]))
        2.5
    """
    return values.detach().double().square().mean().sqrt().item()


def refuse_beyond(layer: Layer, candidates: list[Candidate], predictions: list[Prediction]) -> list[Prediction]:
    """Refuses the candidates of a layer whose noise is beyond `SECOND_ORDER`.

    Where that would be all of them, the least noisy candidate remains.

    Args:
        layer: The layer.
        candidates: Its candidates.
        predictions: A theory's prediction for each candidate.
    """
    sizes = [_noise(layer, candidate) for candidate in candidates]
    largest = max(SECOND_ORDER, min(sizes, default=0.0))
    return [
        prediction if size <= largest else Prediction(math.inf)
        for size, prediction in zip(sizes, predictions, strict=True)
    ]


def refuse_flat(
    problem: Problem, predictions: dict[str, list[Prediction]], flat: list[str]
) -> dict[str, list[Prediction]]:
    """Refuses all but keeping the layers in which the loss is flat to the second order, and names them in a warning.

    Where every second derivative is zero, each change would cost nothing, which says that these rows, or the dtype, do
    not show what it costs.

    Args:
        problem: With the candidates of the layers.
        predictions: What a theory said of each, by layer name.
        flat: Names of the layers whose second derivatives are all zero.
    """
    if flat and process_state().is_main_process:
        _logger.warning(
            "only to be kept, for the second derivative of the loss is zero there, or underflows to zero: %s. "
            "Calibrate on other rows, load the model in a wider dtype, or use theory='llc', which needs none.",
            ", ".join(flat),
        )
    refused = {
        name: [Prediction(0.0 if candidate.kind == "kept" else math.inf) for candidate in problem.candidates[name]]
        for name in flat
    }
    return predictions | refused


def _noise(layer: Layer, candidate: Candidate) -> float:
    return 0.0 if candidate.kind == "kept" else rms(candidate.error(layer.matrix))
