"""From predictions to the plan: the knapsack, the target, and a measurement that may send it back.

A prediction by derivatives is stated to be right to within a factor of two, and is checked: the weights as planned are
put into the model, and the loss is measured on the calibration rows. Where

    measured > 2 predicted + 2 standard errors of the measurement + a thousandth of the loss

the layers that the plan spends most on are measured one by one. Where one costs more than predicted by two standard
errors, its predictions are multiplied by measured over predicted; those of all other layers by what is left of the
plan's measured change over what is left of its prediction, but never by less than 1. Then the knapsack runs again.
Quantised inputs are measured with the weights, and stay as they were chosen. A loss that falls, or rises less than
predicted, is no reason to plan anew.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
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
"""A prediction is stated to be right to within this factor."""

REMEASURED_LAYERS = 8
"""Layers that are measured one by one, at one forward pass each, where a plan's prediction was off."""

REPLANS = 2
"""How often the knapsack may run again."""

CHOICES_BY_ESTIMATE = 5
"""How often entropy-coded layers are chosen by estimates."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A plan, and the values that go with it.

    Attributes:
        plan: The plan.
        frontier: What it was chosen from.
        stored: What becomes of each layer, by its name; in the order of the plan.
        checks: What was measured on the way to it: this plan, those that it took the place of, and layers alone.
    """

    plan: CompressionPlan
    frontier: knapsack.Frontier
    stored: dict[str, StoredLayer]
    checks: tuple[LossCheck, ...] = ()

    def error(self, layer: Layer) -> Tensor:
        """What the plan does to a layer's weight, stored less original, float32 [out, in]."""
        matrix, values = layer.matrix.detach().float(), self.stored[layer.name].values
        return torch.zeros_like(matrix) if values is None else values.dense.to(matrix.device) - matrix


@dataclass(frozen=True)
class Planner:
    """What the data say of a model: what its layers may become, and what each of it is predicted to cost.

    Attributes:
        problem: The model, its data, and the candidates of its layers.
        predictions: One for each candidate.
        checked: Whether a plan's prediction is compared with a measurement, and the plan made anew where it was off.
        theory: Name of the theory that made the predictions.
        choices: What was proposed.
        other_bytes: Bytes of the tensors that are no layer's weight.
        original_bytes: Bytes of all the original's tensors.
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
        """Makes the plan that meets a target at the least predicted loss; the model is left as it was.

        Raises:
            CalibrationError: A layer can be stored in no way, or the loss of the plan is not finite.
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
        """The rate-distortion bound, by ascending bytes, in the metric and on the scale of what coded grids cost.

        None where no layer can be entropy-coded.
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
        losses = {round(num_bytes): factor * loss for num_bytes, loss in points}  # the finer level of two that coincide
        return tuple(sorted(losses.items()))

    def _options(self) -> Options:
        """What the knapsack may choose from; which input goes with which weight is decided here, once for all plans."""
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
        """The best plan whose layers have been rounded, so that bytes are those on disk.

        Entropy-coded layers are chosen by estimates, rounded, and chosen again with what was found, until no chosen
        layer is left that has not been rounded. In the last round there is no other choice.
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
        """Rounds the layers that are not held on these grids, and notes what was found; others are let go."""
        held = {name: one for name, one in self._coded.items() if grids.get(name) == one.grid}
        missing = {name: grid for name, grid in grids.items() if name not in held}
        rounded = round_coded(self.problem.layers, missing, self.problem.calibration)
        for name, one in rounded.items():
            self._found[name][one.grid] = RoundedCost(one.cost_bytes, one.cost)
        self._coded.clear()
        self._coded.update(held | rounded)

    def _rounded_of(self, name: str, group: list[Option]) -> list[Option]:
        """The options of a layer that are no estimate; all, where there are only estimates."""
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
            reasons = []
            if self.problem.unreached:
                reasons.append(
                    f"On the calibration rows the gradient of the loss is zero for {self.problem.unreached[0]!r} "
                    f"and {len(self.problem.unreached) - 1} other layer(s), which are kept for it: calibrate on other "
                    "rows, or load a float16 model in another dtype, for small gradients vanish in float16."
                )
            left_out = left_out_text(self.problem.model, find_layers(self.problem.model))
            if left_out is not None:
                reasons.append(f"{left_out}.")
            if not reasons:
                raise
            raise UnreachableTargetError(" ".join([str(error), *reasons])) from error

    def _as_stated(self, planned: Planned, measured: LossChange) -> bool:
        """Whether the loss rises by no more than the prediction states."""
        predicted = planned.plan.predicted_loss_change
        _logger.info("predicted change of the loss %.3g, measured %.3g +- %.2g", predicted, *measured)
        floor = NEGLIGIBLE_SHARE * abs(self.problem.calibration.loss)
        return measured.mean <= STATED_FACTOR * max(predicted, 0.0) + 2 * measured.standard_error + floor

    def _measured(self, planned: Planned, layers: Iterable[Layer]) -> LossChange:
        """The change of the loss on the calibration rows with these layers as planned; one forward pass."""
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
        """What the layers that the plan spends most on cost by themselves; one forward pass each."""
        spent = {name: layer.predicted_loss_change for name, layer in planned.plan.layers.items()}
        paid = [layer for layer in self.problem.layers if spent[layer.name] > 0]
        worst = sorted(paid, key=lambda layer: spent[layer.name], reverse=True)[:REMEASURED_LAYERS]
        return {layer.name: self._measured(planned, [layer]) for layer in worst}


def _corrected(options: Options, plan: CompressionPlan, measured: LossChange, alone: dict[str, LossChange]) -> Options:
    """Options that cost what a plan was measured to cost: some layers by themselves, and what is left of the whole."""
    spent = {name: layer.predicted_loss_change for name, layer in plan.layers.items()}
    worse = {
        name: one.mean for name, one in alone.items() if not one.mean <= spent[name] + 2 * one.standard_error
    }  # NaN is worse
    factors = {name: _factor(mean, spent[name]) for name, mean in worse.items()}
    others = 1.0  # where some layers by themselves account for a loss that is not finite
    if all(map(math.isfinite, worse.values())):
        left = sum(change for name, change in spent.items() if name not in factors)
        others = _factor(measured.mean - sum(worse.values()), left) if left > 0 else 1.0
    _logger.info("measured over predicted: %s, others %.2f", factors, others)
    return {name: [scaled(option, factors.get(name, others)) for option in group] for name, group in options.items()}


def _factor(measured: float, predicted: float) -> float:
    """Measured over predicted, at least 1; a million where the loss is not finite."""
    return max(1.0, measured / predicted) if math.isfinite(measured) else 1e6


def _rounding_of(rounded: QuantisedInput, values: Tensor) -> Tensor:
    """What an input's grid adds to it."""
    change: Tensor = rounded(values) - values
    return change
