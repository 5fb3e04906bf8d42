"""From predictions to the plan: the knapsack, the target, and a measurement that may send it back.

A prediction by derivatives is stated to be right to within a factor of two, and is checked: the weights as planned are
put into the model, and the loss is measured on the calibration rows. Where

    measured > 2 predicted + 2 standard errors of the measurement

the layers that the plan spends most on are measured one by one. The predictions of each are multiplied by measured over
predicted, those of the other layers by the median of these factors, and the knapsack runs again. A loss that falls, or
rises less than predicted, is no reason to plan anew.
"""

import logging
import math
import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import Tensor

from hf_lossless import knapsack
from hf_lossless.calibration.perturbation import LossChange, loss_change, weight_noise
from hf_lossless.candidates.low_rank import Factors
from hf_lossless.candidates.proposal import Candidate
from hf_lossless.candidates.settle import settle
from hf_lossless.candidates.uniform import QuantisedMatrix, dequantise
from hf_lossless.config import LosslessCompressionConfig
from hf_lossless.errors import CalibrationError
from hf_lossless.layers import Layer
from hf_lossless.plan import CompressionPlan, LayerPlan
from hf_lossless.target import choose_plan
from hf_lossless.theories.problem import Prediction, Problem

STATED_FACTOR = 2.0
"""A prediction is stated to be right to within this factor."""

REMEASURED_LAYERS = 8
"""Layers that are measured one by one, at one forward pass each, where a plan's prediction was off."""

REPLANS = 2
"""How often the knapsack may run again."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Option:
    """What the knapsack may choose for a layer, and the candidate that it stands for."""

    plan: LayerPlan
    candidate: Candidate


@dataclass(frozen=True)
class Planned:
    """A plan, and the values that go with it.

    Attributes:
        plan: The plan.
        frontier: What it was chosen from.
        factors: Factors by layer name, where it has any.
        quantised: Codes by layer name, where their rounding needs the calibration data.
    """

    plan: CompressionPlan
    frontier: knapsack.Frontier
    factors: dict[str, Factors]
    quantised: dict[str, QuantisedMatrix]

    def error(self, layer: Layer) -> Tensor:
        """What the plan does to a layer's weight, stored less original, float32 [out, in]."""
        quantised = self.quantised.get(layer.name)
        if quantised is not None:
            stored = dequantise(quantised.codes, quantised.scales, quantised.zeros, quantised.grid)
            return stored - layer.matrix.detach().float()
        layer_plan = self.plan.layers[layer.name]
        candidate = Candidate(
            layer_plan.grid,
            layer_plan.cost_bytes,
            low_rank=layer_plan.low_rank,
            factors=self.factors.get(layer.name),
        )
        return candidate.error(layer.matrix)


@dataclass(frozen=True)
class Planner:
    """What a plan is made of, but for the predictions.

    Attributes:
        problem: The model, its data, and the candidates of its layers.
        config: The target.
        other_bytes: Bytes of the tensors that are no layer's weight.
        original_bytes: Bytes of all the original's tensors.
    """

    problem: Problem
    config: LosslessCompressionConfig
    other_bytes: int
    original_bytes: int

    def plan(self, predictions: dict[str, list[Prediction]], *, checked: bool) -> Planned:
        """The plan that meets the target at the least predicted loss.

        Args:
            predictions: One for each candidate.
            checked: Whether the prediction is compared with a measurement, and the plan made anew where it was off.

        Raises:
            CalibrationError: A layer can be stored in no way.
            UnreachableTargetError: No plan meets the target.
        """
        planned = self._plan(predictions)
        for replans_left in range(REPLANS if checked else 0, -1, -1):
            if not checked or self._as_stated(planned):
                break
            if not replans_left:
                _logger.warning("the loss rises by more than predicted, also after %d new plans", REPLANS)
                break
            predictions = self._corrected(predictions, planned)
            planned = self._plan(predictions)
        return planned

    def _plan(self, predictions: dict[str, list[Prediction]]) -> Planned:
        options = {
            layer.name: _options(layer, self.problem.candidates[layer.name], predictions[layer.name])
            for layer in self.problem.layers
        }
        frontier = knapsack.frontier(
            costs=[[option.plan.cost_bytes for option in group] for group in options.values()],
            losses=[[option.plan.predicted_loss_change for option in group] for group in options.values()],
        )

        def plan_at(point: int) -> CompressionPlan:
            chosen = zip(options.items(), frontier.choices(point), strict=True)
            return CompressionPlan(
                theory=self.config.theory,
                layers={name: group[choice].plan for (name, group), choice in chosen},
                other_bytes=self.other_bytes,
                original_bytes=self.original_bytes,
                activation_noise=self.config.activation_noise,
            )

        plan = choose_plan(frontier, plan_at, self.config)
        chosen = {
            name: next(option.candidate for option in options[name] if option.plan == layer_plan)
            for name, layer_plan in plan.layers.items()
        }
        factors = {name: one.factors for name, one in chosen.items() if one.factors is not None}
        return Planned(plan, frontier, factors, settle(self.problem.layers, plan.layers, self.problem.calibration))

    def _as_stated(self, planned: Planned) -> bool:
        """Whether the loss rises by no more than the prediction states."""
        measured = self._measured(planned, self.problem.layers)
        predicted = planned.plan.predicted_loss_change
        _logger.info("predicted change of the loss %.3g, measured %.3g +- %.2g", predicted, *measured)
        return measured.mean <= STATED_FACTOR * max(predicted, 0.0) + 2 * measured.standard_error

    def _measured(self, planned: Planned, layers: Iterable[Layer]) -> LossChange:
        """The change of the loss on the calibration rows with these layers' weights as planned; one forward pass."""
        with ExitStack() as stack:
            for layer in layers:
                if planned.plan.layers[layer.name].kind != "kept":
                    stack.enter_context(weight_noise(layer, planned.error(layer)))
            return loss_change(
                self.problem.model, self.problem.batches, self.problem.loss, self.problem.calibration.batch_losses
            )

    def _corrected(self, predictions: dict[str, list[Prediction]], planned: Planned) -> dict[str, list[Prediction]]:
        """Predictions as the layers that a plan spends most on would have them."""

        def predicted(layer: Layer) -> float:
            return planned.plan.layers[layer.name].predicted_loss_change

        worst = [layer for layer in sorted(self.problem.layers, key=predicted, reverse=True) if predicted(layer) > 0]
        factors = {}
        for layer in worst[:REMEASURED_LAYERS]:
            measured = self._measured(planned, [layer])
            factors[layer.name] = max(1.0, measured.mean / predicted(layer)) if math.isfinite(measured.mean) else 1e6
        if not factors:
            return predictions
        _logger.info("measured over predicted: %s", {name: round(factor, 2) for name, factor in factors.items()})
        others = statistics.median(factors.values())
        return {
            name: [replace(one, loss_change=one.loss_change * factors.get(name, others)) for one in group]
            for name, group in predictions.items()
        }


def _options(layer: Layer, candidates: list[Candidate], predictions: list[Prediction]) -> list[Option]:
    """What the knapsack may choose from; a candidate that the theory refuses is none of it."""
    options = []
    for candidate, prediction in zip(candidates, predictions, strict=True):
        if prediction.usable:
            layer_plan = LayerPlan(
                kind=candidate.kind,
                grid=candidate.grid,
                low_rank=candidate.low_rank,
                cost_bytes=candidate.cost_bytes,
                predicted_loss_change=float(f"{prediction.loss_change:.4g}"),  # what follows is noise, and costs bytes
                regime=prediction.regime,
                tied=layer.tied,
            )
            options.append(Option(layer_plan, candidate))
    if not options:
        widths = [candidate.grid.bits for candidate in candidates if candidate.grid is not None]
        raise CalibrationError(
            f"layer {layer.name!r} can be stored in no way: at each of {widths} bits the loss is not finite, or the "
            "theory refuses. Add wider widths (16 keeps a layer), or keep this layer out with modules_to_not_convert."
        )
    return options
