"""What predicts the change of the loss for every way to store a layer: a file for each theory, and `THEORIES`.

This file loads none of them, nor torch, so that a configuration or a command line can name them at no cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from hf_lossless.candidates.choices import Truncation

if TYPE_CHECKING:
    from hf_lossless.theories.problem import Prediction, Problem


@dataclass(frozen=True)
class Theory:
    """A theory: where it is, what it needs to know of the layers, and what it can put a price on.

    Attributes:
        module: Its file in this folder, which has `predict(problem)`.
        truncation: How it cuts a matrix to a rank.
        gradients: Whether it needs the mean gradient of every weight.
        gradients_for_ranks: Whether it needs that where there are ranks to choose from.
        curvature: Whether it needs the Kronecker factors of every layer.
        by_derivatives: Whether it predicts from derivatives alone; a plan's loss is then measured, and a layer that no
            gradient reaches is kept.
        coded: Whether it can say what entropy-coded grids cost.
        quantised_inputs: Whether it can say what quantised inputs cost.
        options: Settings of the configuration that it alone has.
    """

    module: str
    truncation: Truncation
    gradients: bool = False
    gradients_for_ranks: bool = False
    curvature: bool = False
    by_derivatives: bool = False
    coded: bool = False
    quantised_inputs: bool = False
    options: tuple[str, ...] = ()

    @property
    def predict(self) -> "Callable[[Problem], dict[str, list[Prediction]]]":
        """Predicts the loss change of every candidate, by layer."""
        found: Callable[[Problem], dict[str, list[Prediction]]] = import_module(f"{__name__}.{self.module}").predict
        return found


THEORIES: dict[str, Theory] = {
    "llc": Theory("llc", "plain", gradients_for_ranks=True, options=("activation_noise",)),
    "lod": Theory("lod", "descent", gradients=True),
    "cet": Theory("cet", "plain", by_derivatives=True),
    "hawq": Theory("hawq", "plain", by_derivatives=True),
    "curvature": Theory("curvature", "metric", curvature=True, by_derivatives=True, coded=True, quantised_inputs=True),
}
