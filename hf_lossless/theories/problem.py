"""The input and the output of a theory: `Problem` and `Prediction`.

A theory is a function `predict(problem) -> {layer name: one Prediction for each of the layer's candidates}`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from hf_lossless.calibration.perturbation import mean_loss, weight_noise
from hf_lossless.calibration.statistics import Calibration
from hf_lossless.candidates.grids import Candidate
from hf_lossless.data.batches import Batch, LossFunction
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import Regime


@dataclass(frozen=True)
class Problem:
    """A model, its calibration data and statistics, and the candidates of its layers.

    Attributes:
        model: The model, in evaluation mode; a theory restores it.
        batches: All calibration batches, the same in every process.
        loss: Mean loss of a batch.
        layers: The layers.
        calibration: Statistics of the layers, and the loss f(M) of the original model.
        candidates: Candidates by layer name.
        seed: Seed of all random numbers.
        activation_noise: Whether the input of a layer counts as quantised to the width of its weight.
        advance: Called once for every candidate, for a progress bar.
    """

    model: nn.Module
    batches: list[Batch]
    loss: LossFunction
    layers: list[Layer]
    calibration: Calibration
    candidates: dict[str, list[Candidate]]
    seed: int = 0
    activation_noise: bool = False
    advance: Callable[[], object] = lambda: None

    @property
    def unreached(self) -> list[str]:
        """Lists the names of the layers that no gradient reaches on the calibration rows, and that can only be kept."""
        return [name for name in self._without_derivatives if not self.calibration.layers[name].underflows]

    @property
    def underflown(self) -> list[str]:
        """Lists the names of the layers whose derivatives underflow their dtype, and that can only be kept."""
        return [name for name in self._without_derivatives if self.calibration.layers[name].underflows]

    @property
    def _without_derivatives(self) -> list[str]:
        return [
            layer.name
            for layer in self.layers
            if not self.calibration.layers[layer.name].has_derivatives
            and all(candidate.kind == "kept" for candidate in self.candidates[layer.name])
        ]


@dataclass(frozen=True)
class Prediction:
    """A theory's prediction for one candidate.

    Attributes:
        loss_change: Predicted change of the mean loss; infinity where the theory refuses the candidate.
        regime: LoD's verdict; None for other theories.
    """

    loss_change: float
    regime: Regime | None = None

    @property
    def usable(self) -> bool:
        """Tells whether the knapsack may choose the candidate."""
        return math.isfinite(self.loss_change)


def predictions_of_kept(problem: Problem) -> dict[str, list[Prediction]]:
    """Predicts 0 for the layers that can only be kept.

    Args:
        problem: The problem, of which layers and candidates are used.

    Returns:
        Predictions by layer name, for these layers only.
    """
    chosen = {layer.name for layer in layers_with_a_choice(problem)}
    predictions = {}
    for layer in problem.layers:
        if layer.name not in chosen:
            predictions[layer.name] = [Prediction(0.0) for _ in problem.candidates[layer.name]]
            for _ in problem.candidates[layer.name]:
                problem.advance()
    return predictions


def layers_with_a_choice(problem: Problem) -> list[Layer]:
    """Finds the layers that have a candidate beside keeping them."""

    def is_change(candidate: Candidate) -> bool:
        return candidate.kind != "kept"

    return [layer for layer in problem.layers if any(map(is_change, problem.candidates[layer.name]))]


def measured_change(problem: Problem, layer: Layer, error: Tensor) -> float:
    """Measures f(M with W + d in this layer) - f(M) over the calibration data; one forward pass.

    Args:
        problem: The problem, of which model, batches and loss are used.
        layer: The layer.
        error: d [out, in].

    Returns:
        The change, the same in every process; NaN or infinity where the loss is not finite.
    """
    with weight_noise(layer, error):
        return mean_loss(problem.model, problem.batches, problem.loss) - problem.calibration.loss
