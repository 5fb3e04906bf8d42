"""The theories that predict the loss change of every way to store a layer, one file each, listed in `THEORIES`.

This file imports neither the theories nor torch, so that configuration and command line can name them at no cost.
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
    """A theory: its module, the statistics it needs, and the kinds of candidates it can predict.

    Attributes:
        module: Its module in this package, which defines `predict(problem)`.
        truncation: How matrices are truncated to a rank for it.
        gradients: Whether it needs the mean gradient of every weight.
        gradients_for_ranks: Whether it needs these gradients where ranks are among the choices.
        curvature: Whether it needs the Kronecker factors of every layer.
        by_derivatives: Whether it predicts from derivatives alone; a plan's loss is then measured, and a layer that no
            gradient reaches is kept.
        coded: Whether it can predict entropy-coded grids.
        quantised_inputs: Whether it can predict quantised inputs.
        options: Settings of the configuration that apply to this theory only.
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
        """Returns the function that predicts the loss change of every candidate, by layer."""
        found: Callable[[Problem], dict[str, list[Prediction]]] = import_module(f"{__name__}.{self.module}").predict
        return found


THEORIES: dict[str, Theory] = {
    "llc": Theory("llc", "plain", gradients_for_ranks=True, options=("activation_noise",)),
    "lod": Theory("lod", "descent", gradients=True),
    "cet": Theory("cet", "plain", by_derivatives=True),
    "hawq": Theory("hawq", "plain", by_derivatives=True),
    "curvature": Theory("curvature", "metric", curvature=True, by_derivatives=True, coded=True, quantised_inputs=True),
}
