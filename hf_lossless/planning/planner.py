"""Makes the plan from the predictions: runs the knapsack, measures the plan, and replans where it is off.

A prediction by derivatives is expected to hold to within a factor of two, and is checked: the planned weights are put
into the model, and the loss is measured on the calibration rows. Where

    measured > 2 predicted + 2 standard errors of the measurement + a thousandth of the loss

the layers with the largest predicted changes are measured one by one. Where one exceeds its prediction by two standard
errors, its predictions are multiplied by measured over predicted; those of all other layers by the ratio of the
remaining measured change to the remaining prediction, but never by less than 1. Then the knapsack runs again. Quantised
inputs are measured with the weights, and their choice does not change. A loss that falls, or rises less than predicted,
does not trigger a new plan.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from hf_lossless.calibration.perturbation import LossChange, input_noise, loss_change, weight_noise
from hf_lossless.candidates.choices import Choices
from hf_lossless.candidates.parallel import for_each_layer
from hf_lossless.candidates.round_coded import CodedRounding, round_coded
from hf_lossless.candidates.round_packed import round_with_feedback
from hf_lossless.candidates.stored import stored_layer
from hf_lossless.data.processes import process_state
from hf_lossless.errors import CalibrationError, UnreachableTargetError
from hf_lossless.planning import knapsack
from hf_lossless.planning.loss_check import NEGLIGIBLE_SHARE, LossCheck, loss_check
from hf_lossless.planning.options import Option, Options, RoundedCost, options_of, scaled, with_rounded_costs
from hf_lossless.planning.target import Target, choose_plan
from hf_lossless.storage.apply import quantised_input
from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.layers import Layer, find_layers, left_out_text
from hf_lossless.storage.modules.activations import QuantisedInput
from hf_lossless.storage.plan import CodedGrid, CompressionPlan, activations_of
from hf_lossless.storage.values import EncodedMatrix, StoredLayer
from hf_lossless.theories.problem import Prediction, Problem
from hf_lossless.theories.quantised_inputs import activation_options
from hf_lossless.theories.rate_distortion import rate_distortion

STATED_FACTOR = 2.0
"""Factor to within which a prediction is expected to hold."""

REMEASURED_LAYERS = 8
"""Number of layers that are measured one by one, at one forward pass each, where a plan's prediction is off."""

REPLANS = 2
"""Largest number of further runs of the knapsack."""

CHOICES_BY_ESTIMATE = 5
"""Number of rounds in which entropy-coded layers are chosen by estimates."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A plan, the stored values of its layers, and its checks.

    Attributes:
        plan: The plan.
        frontier: The frontier that it was chosen from.
        stored: The stored values of each layer by name, in the order of the plan.
        checks: Measurements made for it: of this plan, of the plans it replaced, and of layers alone.
    """

    plan: CompressionPlan
    frontier: knapsack.Frontier
    stored: dict[str, StoredLayer]
    checks: tuple[LossCheck, ...] = ()

    def error(self, layer: Layer) -> Tensor:
        """Computes the plan's weight error of a layer, stored minus original, float32 [out, in].

        Args:
            layer: A layer of the original model, with real weights.
        """
        matrix, values = layer.matrix.detach().float(), self.stored[layer.name].values
        return torch.zeros_like(matrix) if values is None else values.dense.to(matrix.device) - matrix


@dataclass(frozen=True)
class Planner:
    """The candidates of a model's layers with their predictions, from which plans for any target are made.

    Attributes:
        problem: The model, its data, and the candidates of its layers.
        predictions: Predictions of each layer's candidates, by layer name.
        checked: Whether a plan's prediction is compared with a measurement, and the plan remade where it is off.
        theory: Name of the theory that made the predictions.
        choices: The choices behind the candidates.
        other_bytes: Bytes of all tensors that are not a layer's weight.
        original_bytes: Bytes of all tensors of the original.
    """

    problem: Problem
    predictions: dict[str, list[Prediction]]
    checked: bool
    theory: str
    choices: Choices
    other_bytes: int
    original_bytes: int
    _found: dict[str, dict[CodedGrid, RoundedCost]] = field(default_factory=lambda: defaultdict(dict), repr=False)
    _coded: dict[str, CodedRounding] = field(default_factory=dict, repr=False)

    def plan(self, target: Target) -> Planned:
        """Makes the plan that meets a target at the least predicted loss; the model is restored.

        Args:
            target: Any target but a tolerance.

        Returns:
            The plan with its stored values and checks.

        Raises:
            CalibrationError: No way to store a layer is left, or the loss of the plan is not finite.
            UnreachableTargetError: No plan meets the target.
        """
        options = self._options()
        planned = self._plan(options, target)
        if not self.checked:
            return planned
        num_batches = len(self.problem.batches)
        measured = self._measured(planned, self.problem.layers)
        checks = [loss_check(planned.plan, measured, num_batches)]
        for _ in range(REPLANS):
            if self._as_stated(planned, measured):
                break
            alone = self._one_by_one(planned)
            checks += [
                loss_check(planned.plan, one, num_batches, checked="layer", layer=name) for name, one in alone.items()
            ]
            options = _corrected(options, planned.plan, measured, alone)
            planned = self._plan(options, target)
            measured = self._measured(planned, self.problem.layers)
            checks.append(loss_check(planned.plan, measured, num_batches))
        else:
            if not math.isfinite(measured.mean):
                raise CalibrationError(
                    f"the loss of the best plan is not finite, also after {REPLANS} new plans. "
                    "Ask for a larger checkpoint, or add wider widths (16 keeps a layer)."
                )
            if not self._as_stated(planned, measured) and process_state().is_main_process:
                _logger.warning("the loss rises by more than predicted, also after %d new plans", REPLANS)
        return replace(planned, checks=tuple(checks))

    def bound(self) -> tuple[tuple[int, float], ...] | None:
        """Computes the rate-distortion bound by ascending bytes, in the metric and scale of coded grids' predictions.

        The bound is None where no layer can be entropy-coded.
        """
        coded = {
            layer.kind: (candidate, prediction)
            for layer in self.problem.layers
            for candidate, prediction in zip(
                self.problem.candidates[layer.name], self.predictions[layer.name], strict=True
            )
            if candidate.coded is not None
        }
        if not coded:
            return None
        candidate, prediction = next(iter(coded.values()))
        factor = prediction.loss_change / max(candidate.expected_cost, 1e-300)
        dampings = {kind: one.coded.damping for kind, (one, _) in coded.items() if one.coded is not None}
        points = rate_distortion(self.problem, self.other_bytes, damping=dampings.get)
        losses = {round(num_bytes): factor * loss for num_bytes, loss in points}  # the finer of two equal sizes
        return tuple(sorted(losses.items()))

    def _options(self) -> Options:
        """Makes the options of all layers, and decides once for all plans which input grid goes with which weight."""
        layers, calibration = self.problem.layers, self.problem.calibration
        activations = for_each_layer(
            lambda layer: activation_options(calibration.layers[layer.name], self.choices.activation_widths), layers
        )
        return {
            layer.name: options_of(
                layer,
                self.problem.candidates[layer.name],
                self.predictions[layer.name],
                activations[layer.name],
                may_stay_float=None in self.choices.activation_bits,
            )
            for layer in layers
        }

    def _plan(self, options: Options, target: Target) -> Planned:
        """Makes the best plan whose layers have all been rounded, so that bytes are those on disk.

        Entropy-coded layers are chosen by estimates, rounded, and chosen again by their measured bytes and costs, until
        every chosen layer has been rounded. In the last round only rounded layers can be chosen.
        """
        for last in (*[False] * CHOICES_BY_ESTIMATE, True):
            present = {name: with_rounded_costs(group, self._found[name]) for name, group in options.items()}
            if last:
                present = {name: self._rounded_of(name, group) for name, group in present.items()}
            plan, frontier = self._chosen(present, target)
            grids = {name: one.coded for name, one in plan.layers.items() if one.coded is not None}
            if all(grid in self._found[name] for name, grid in grids.items()):
                break
            self._round(grids)
        self._round(grids)
        rounded: dict[str, QuantisedMatrix | EncodedMatrix] = {
            **round_with_feedback(self.problem.layers, plan.layers, self.problem.calibration),
            **{name: self._coded[name].values for name in grids},
        }
        stored = {}
        for layer in self.problem.layers:
            layer_plan = plan.layers[layer.name]
            option = next(option for option in present[layer.name] if option.plan == layer_plan)
            stored[layer.name] = stored_layer(
                layer,
                layer_plan,
                factors=option.candidate.factors,
                rounded=rounded.get(layer.name),
                static=option.static,
            )
        return Planned(plan, frontier, stored)

    def _round(self, grids: dict[str, CodedGrid]) -> None:
        """Rounds layers on these grids unless that is done, records bytes and costs, and frees other rounded layers."""
        held = {name: one for name, one in self._coded.items() if grids.get(name) == one.grid}
        missing = {name: grid for name, grid in grids.items() if name not in held}
        rounded = round_coded(self.problem.layers, missing, self.problem.calibration)
        for name, one in rounded.items():
            self._found[name][one.grid] = RoundedCost(one.cost_bytes, one.cost)
        self._coded.clear()
        self._coded.update(held | rounded)

    def _rounded_of(self, name: str, group: list[Option]) -> list[Option]:
        """Returns the options of a layer that are not estimates; all options where all are estimates."""
        known = [one for one in group if one.plan.coded is None or one.plan.coded in self._found[name]]
        return known or group

    def _chosen(self, options: Options, target: Target) -> tuple[CompressionPlan, knapsack.Frontier]:
        frontier = knapsack.frontier(
            costs=[[option.plan.cost_bytes for option in group] for group in options.values()],
            losses=[[option.plan.predicted_loss_change for option in group] for group in options.values()],
        )

        def plan_at(point: int) -> CompressionPlan:
            chosen = zip(options.items(), frontier.choices(point), strict=True)
            layer_plans = {name: group[choice].plan for (name, group), choice in chosen}
            return CompressionPlan(
                theory=self.theory,
                layers=layer_plans,
                other_bytes=self.other_bytes,
                original_bytes=self.original_bytes,
                activations=activations_of(layer_plans),
                activation_noise=self.problem.activation_noise,
            )

        try:
            return choose_plan(frontier, plan_at, target, self.choices.bits), frontier
        except UnreachableTargetError as error:
            reasons = list(self._why_larger())
            if not reasons:
                raise
            raise UnreachableTargetError(" ".join([str(error), *reasons])) from error

    def _why_larger(self) -> Iterator[str]:
        """Says which layers no plan can make smaller, and why; nothing where there are none."""
        kept = [*self.problem.unreached, *self.problem.underflown]
        if kept:
            yield (
                f"On the calibration rows the gradient of the loss is zero, or underflows to zero, for {_named(kept)}, "
                "which are kept for it: calibrate on other rows, or load the model in a wider dtype, for small "
                "gradients vanish, in float16 those below 6e-8."
            )
        refused = [
            name
            for name, group in self.predictions.items()
            if name not in kept
            and all(
                candidate.kind == "kept" or not prediction.usable
                for candidate, prediction in zip(self.problem.candidates[name], group, strict=True)
            )
        ]
        if refused:
            yield f"The theory refuses all but to keep {_named(refused)}: try theory='curvature' or theory='llc'."
        left_out = left_out_text(self.problem.model, find_layers(self.problem.model))
        if left_out is not None:
            yield f"{left_out}."

    def _as_stated(self, planned: Planned, measured: LossChange) -> bool:
        """Tells whether the loss rises by no more than the prediction states."""
        predicted = planned.plan.predicted_loss_change
        _logger.info("predicted change of the loss %.3g, measured %.3g +- %.2g", predicted, *measured)
        floor = NEGLIGIBLE_SHARE * abs(self.problem.calibration.loss)
        return measured.mean <= STATED_FACTOR * max(predicted, 0.0) + 2 * measured.standard_error + floor

    def _measured(self, planned: Planned, layers: Iterable[Layer]) -> LossChange:
        """Measures the loss change on the calibration rows with these layers as planned; one forward pass."""
        with ExitStack() as stack:
            for layer in layers:
                layer_plan = planned.plan.layers[layer.name]
                if layer_plan.kind != "kept":
                    stack.enter_context(weight_noise(layer, planned.error(layer)))
                if layer_plan.activation is not None:
                    rounded = quantised_input(layer, layer_plan.activation, planned.stored[layer.name].static)
                    stack.enter_context(input_noise(self.problem.model, layer, partial(_rounding_of, rounded)))
            return loss_change(
                self.problem.model, self.problem.batches, self.problem.loss, self.problem.calibration.batch_losses
            )

    def _one_by_one(self, planned: Planned) -> dict[str, LossChange]:
        """Measures the layers with the largest predicted changes alone; one forward pass each."""
        spent = {name: layer.predicted_loss_change for name, layer in planned.plan.layers.items()}
        paid = [layer for layer in self.problem.layers if spent[layer.name] > 0]
        worst = sorted(paid, key=lambda layer: spent[layer.name], reverse=True)[:REMEASURED_LAYERS]
        return {layer.name: self._measured(planned, [layer]) for layer in worst}


def _named(layers: list[str]) -> str:
    return f"{layers[0]!r} and {len(layers) - 1} other layer(s)"


def _corrected(options: Options, plan: CompressionPlan, measured: LossChange, alone: dict[str, LossChange]) -> Options:
    """Corrects options by a plan's measurement: some layers by their own, the others by the remaining change."""
    spent = {name: layer.predicted_loss_change for name, layer in plan.layers.items()}
    worse = {
        name: one.mean for name, one in alone.items() if not one.mean <= spent[name] + 2 * one.standard_error
    }  # NaN is worse
    factors = {name: _factor(mean, spent[name]) for name, mean in worse.items()}
    others = 1.0  # where single layers cause a loss that is not finite
    if all(map(math.isfinite, worse.values())):
        left = sum(change for name, change in spent.items() if name not in factors)
        others = _factor(measured.mean - sum(worse.values()), left) if left > 0 else 1.0
    _logger.info("measured over predicted: %s, others %.2f", factors, others)
    return {name: [scaled(option, factors.get(name, others)) for option in group] for name, group in options.items()}


def _factor(measured: float, predicted: float) -> float:
    """Returns measured over predicted, at least 1; a million where the loss is not finite."""
    return max(1.0, measured / predicted) if math.isfinite(measured) else 1e6


def _rounding_of(rounded: QuantisedInput, values: Tensor) -> Tensor:
    """Computes the error of an input's grid."""
    change: Tensor = rounded(values) - values
    return change
