"""The loss of a model one layer of which is stored as a candidate would store it."""

from torch import Tensor

from hf_lossless.calibration.perturbation import mean_loss, weight_noise
from hf_lossless.storage.layers import Layer
from hf_lossless.theories.problem import Problem


def measured_change(problem: Problem, layer: Layer, error: Tensor) -> float:
    """f(M with W + d in this layer) - f(M) over the calibration data; one forward pass.

    Args:
        problem: Model and data.
        layer: The layer.
        error: d [out, in].

    Returns:
        The change, the same in every process; NaN or infinity where the loss is not finite.
    """
    with weight_noise(layer, error):
        return mean_loss(problem.model, problem.batches, problem.loss) - problem.calibration.loss
