"""Plans are checked by a measurement, and made anew where the prediction was too small."""

import copy
import dataclasses
import functools
import logging
import math
import re

import pytest
import torch
from rounded_plans import apply_rounded
from torch import Tensor, nn

from hf_lossless import LosslessCompressionConfig, compress
from hf_lossless.calibration.perturbation import LossChange
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.compression import analyse
from hf_lossless.data.batches import batch_loss
from hf_lossless.errors import PlanError, UnreachableTargetError
from hf_lossless.planning import planner as planning
from hf_lossless.planning.planner import Planned, Planner
from hf_lossless.storage.apply import apply
from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.values import EncodedMatrix
from hf_lossless.theories import THEORIES, curvature
from hf_lossless.theories.problem import Prediction

FEATURES, CLASSES = 32, 4
WIDTHS = (1, 2, 3, 4, 6, 8, 16)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 96), nn.ReLU(), nn.LayerNorm(96), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, CLASSES)
    ).eval()


def batches_of(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Labels as the network would have them, more or less."""
    generator, model, batches = torch.Generator().manual_seed(0), network(), []
    for rows in sizes:
        inputs = torch.randn(rows, FEATURES, generator=generator)
        with torch.no_grad():
            chances = torch.softmax(3 * model(inputs), 1)
        batches.append((inputs, torch.multinomial(chances, 1, generator=generator)[:, 0]))
    return batches


BATCHES = batches_of(32, 32, 32, 32)


class Counted:
    """A loss that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        return batch_loss(model, batch)


def config_of(**settings) -> LosslessCompressionConfig:
    return LosslessCompressionConfig(**{"bits": WIDTHS, **settings})


def predict_times(monkeypatch, factor: float) -> None:
    """Lets the default theory predict so many times what it would."""

    def predict(problem, predict=curvature.predict):
        return scaled(predict(problem), factor)

    monkeypatch.setattr(curvature, "predict", predict)


def scaled(predictions: dict[str, list[Prediction]], factor: float) -> dict[str, list[Prediction]]:
    return {
        name: [dataclasses.replace(one, loss_change=one.loss_change * factor) for one in group]
        for name, group in predictions.items()
    }


def planner_of(factor: float = 1.0, model: nn.Module | None = None, batches: list = BATCHES) -> Planner:
    planner = analyse(network() if model is None else model, batches, config_of(ratio=2))
    return dataclasses.replace(planner, predictions=scaled(planner.predictions, factor))


def first_plan(planner: Planner, config: LosslessCompressionConfig) -> Planned:
    """Before anything is measured."""
    return planner._plan(planner._options(), config.target)


def measure_as(monkeypatch, answer) -> list[int]:
    """Lets every measurement of some layers give `answer(planned, layers)`; returns how many layers each had."""
    sizes: list[int] = []

    def measured(planner, planned, layers):
        layers = list(layers)
        sizes.append(len(layers))
        return LossChange(*answer(planned, layers))

    monkeypatch.setattr(Planner, "_measured", measured)
    return sizes


def test_predictions_that_are_far_too_small_are_found_out(monkeypatch):
    predict_times(monkeypatch, 1e-9)
    believed = dataclasses.replace(THEORIES["curvature"], by_derivatives=False)
    config = config_of(loss_budget=0.01)
    result = compress(network(), BATCHES, config)
    monkeypatch.setitem(THEORIES, "curvature", believed)
    blind = compress(network(), BATCHES, config)
    assert {layer.bits for layer in blind.plan.layers.values()} == {1} and blind.measured_loss_change > 0.04
    assert result.plan.predicted_loss_change <= 0.01
    assert result.measured_loss_change <= 0.025  # what is stated: twice the prediction, and the measurement's error
    assert result.plan.predicted_loss_change > 1e4 * blind.plan.predicted_loss_change
    assert result.plan.tensor_bytes > blind.plan.tensor_bytes
    assert [check.checked for check in blind.checks] == ["model"]
    first, *others = (
        result.checks
    )  # the plan that was believed at first, what each layer of it cost, and what came then
    assert first.checked == "plan" and first.measured_loss_change > 1e4 * first.predicted_loss_change
    assert {check.layer for check in others[:3]} == {"0", "3", "5"} and others[0].checked == "layer"
    assert [check.checked for check in others[-2:]] == ["plan", "model"]
    assert others[-1].predicted_loss_change == result.plan.predicted_loss_change
    assert all(check.standard_error > 0 for check in result.checks)


@pytest.mark.parametrize("factor", [1.0, 10.0, 1e3], ids="times-{}".format)
def test_predictions_that_hold_stand(factor, monkeypatch):
    predict_times(monkeypatch, factor)
    config, loss = config_of(loss_budget=1e-3), Counted()
    result = compress(network(), BATCHES, config, loss=loss)
    planner = planner_of()
    assert result.plan == first_plan(planner, config).plan
    assert loss.calls == 3 * len(BATCHES)  # calibration, check, and what is reported at the end


def test_how_many_forward_passes_a_new_plan_takes(monkeypatch):
    """One for each layer that is measured, one to check the new plan."""
    predict_times(monkeypatch, 1e-9)
    loss = Counted()
    compress(network(), BATCHES, config_of(loss_budget=0.01), loss=loss)
    assert loss.calls == (3 + 3 + 1) * len(BATCHES)
    monkeypatch.setattr(planning, "REMEASURED_LAYERS", 2)
    loss = Counted()
    compress(network(), BATCHES, config_of(loss_budget=0.01), loss=loss)
    assert loss.calls in [(3 + 2 + 1) * len(BATCHES), (3 + 2 + 1 + 2 + 1) * len(BATCHES)]


def test_a_theory_that_measures_is_not_checked():
    checked = {theory for theory in THEORIES if THEORIES[theory].by_derivatives}
    assert checked == {"cet", "hawq", "curvature"}
    planner = analyse(network(), BATCHES, config_of(ratio=2, theory="llc", bits=(2, 8)))
    assert not planner.checked and planner_of().checked


def test_what_is_measured_is_the_loss_with_the_planned_weights():
    planner = planner_of()
    planned = planner.plan(config_of(ratio=7).target)
    assert all(isinstance(one.values, QuantisedMatrix) for one in planned.stored.values())
    assert len({layer.kind for layer in planned.plan.layers.values()}) == 1
    for layers in (planner.problem.layers, planner.problem.layers[1:2], []):
        twin = network()
        with torch.no_grad():
            for layer in layers:
                twin.get_submodule(layer.name).weight += planned.error(layer)
            change = sum(
                (batch_loss(twin, batch) - batch_loss(planner.problem.model, batch)).item() for batch in BATCHES
            )
        assert planner._measured(planned, layers).mean == pytest.approx(change / len(BATCHES), abs=1e-6)


def test_planning_leaves_the_model_alone():
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    planner = planner_of(1e-9, model)
    planner.plan(config_of(loss_budget=0.01).target)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_one_analysis_serves_many_plans():
    planner = planner_of(1e-9)
    configs = [
        config_of(loss_budget=0.01),
        config_of(ratio=3),
        config_of(loss_budget=1e-3),
        config_of(loss_budget=0.01),
    ]
    plans = [planner.plan(config.target).plan for config in configs]
    assert plans[0] == plans[3] and len({plan.tensor_bytes for plan in plans}) == 3
    assert plans[1] == planner_of(1e-9).plan(configs[1].target).plan


@pytest.mark.parametrize(
    ("measured", "stands"),
    [
        ((0.0, 0.0), True),
        ((-5.0, 0.0), True),
        ((1.99, 0.0), True),
        ((2.1, 0.0), False),
        ((2.9, 0.5), True),
        ((3.1, 0.5), False),
        ((math.nan, 0.0), False),
        ((math.inf, math.nan), False),
        ((math.nan, math.nan), False),
    ],
    ids=str,
)
def test_what_counts_as_stated(measured, stands, monkeypatch):
    """At most twice the prediction, and two standard errors; in units of the prediction."""
    planner = planner_of(1e4)  # so that a negligible change of the loss is none here
    planned = first_plan(planner, config_of(ratio=7))
    predicted = planned.plan.predicted_loss_change
    assert predicted > 20 * planner.problem.calibration.loss * planning.NEGLIGIBLE_SHARE
    measure_as(monkeypatch, lambda *_: [number * predicted for number in measured])
    assert planner._as_stated(planned, planner._measured(planned, [])) == stands


def test_a_negligible_rise_is_no_reason(monkeypatch):
    planner = planner_of(1e-9)
    planned = first_plan(planner, config_of(ratio=7))
    for share, stands in ((0.9, True), (1.1, False)):
        rise = share * planning.NEGLIGIBLE_SHARE * planner.problem.calibration.loss
        measure_as(monkeypatch, lambda *_, rise=rise: (rise, 0.0))
        assert planner._as_stated(planned, planner._measured(planned, [])) == stands


def changes(options) -> dict[str, list[float]]:
    """What is predicted of each option."""
    return {name: [option.plan.predicted_loss_change for option in group] for name, group in options.items()}


def corrected_options(planner: Planner, options, planned: Planned, whole: LossChange):
    """What the options become after a plan was measured to change the loss by so much."""
    return planning._corrected(options, planned.plan, whole, planner._one_by_one(planned))


def corrections(planner: Planner, planned: Planned, whole: float = 0.0) -> dict[str, float]:
    """By how much the predictions of each layer were multiplied."""
    options = planner._options()
    before, after = changes(options), changes(corrected_options(planner, options, planned, LossChange(whole, 0.0)))
    found = {}
    for name, group in after.items():
        pairs = list(zip(group, before[name], strict=True))
        assert all(new == 0 for new, old in pairs if old == 0)
        [found[name]] = {float(f"{new / old:.2g}") for new, old in pairs if old}
    return found


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ([3.0, 5.0, 4.0], [3, 5, 4]),
        ([0.1, 5.0, -4.0], [1, 5, 1]),
        ([math.inf, 5.0, math.nan], [1e6, 5, 1e6]),
    ],
    ids=["each", "never-down", "not-finite"],
)
def test_predictions_are_multiplied_by_what_was_measured(factors, expected, monkeypatch):
    planner = planner_of()
    planned = first_plan(planner, config_of(ratio=8))
    of_layer = dict(zip(planner.predictions, factors, strict=True))

    def answer(planned, layers):
        [layer] = layers
        return of_layer[layer.name] * planned.plan.layers[layer.name].predicted_loss_change, 0.0

    sizes = measure_as(monkeypatch, answer)
    assert list(corrections(planner, planned).values()) == pytest.approx(expected, rel=0.02)
    assert sizes == [1, 1, 1]


def test_what_a_measurement_may_have_by_chance_is_not_counted(monkeypatch):
    planner = planner_of()
    planned = first_plan(planner, config_of(ratio=8))

    def answer(planned, layers):
        predicted = planned.plan.layers[layers[0].name].predicted_loss_change
        return 10 * predicted, 4.6 * predicted

    measure_as(monkeypatch, answer)
    assert list(corrections(planner, planned).values()) == pytest.approx([1, 1, 1], rel=0.02)


def test_inputs_are_measured_with_the_weights():
    planner = analyse(network(), BATCHES, config_of(ratio=4, activation_bits=(2,)))
    config = config_of(ratio=4, activation_bits=(2,))
    planned = first_plan(planner, config)
    assert any(layer.activation is not None for layer in planned.plan.layers.values())
    twin = copy.deepcopy(planner.problem.model)
    apply(twin, planned.stored)
    change = sum((batch_loss(twin, batch) - batch_loss(planner.problem.model, batch)).item() for batch in BATCHES)
    measured = planner._measured(planned, planner.problem.layers)
    assert measured.mean == pytest.approx(change / len(BATCHES), abs=1e-5) and abs(measured.mean) > 1e-3


def test_corrections_leave_the_inputs_as_they_were_chosen(monkeypatch):
    config = config_of(ratio=4, activation_bits=(None, 4, 8))
    planner = analyse(network(), BATCHES, config)
    planned = first_plan(planner, config)
    measure_as(monkeypatch, lambda planned, layers: (math.inf, 0.0))
    options = planner._options()
    corrected = corrected_options(planner, options, planned, LossChange(math.inf, 0.0))
    for name, group in corrected.items():
        assert [one.plan.activation for one in group] == [one.plan.activation for one in options[name]]


def test_the_other_layers_take_what_is_left(monkeypatch):
    planner = planner_of()
    planned = first_plan(planner, config_of(ratio=8))
    spent = {name: layer.predicted_loss_change for name, layer in planned.plan.layers.items()}
    order = sorted(spent, key=spent.__getitem__, reverse=True)
    factors = {order[0]: 3.0, order[1]: 0.5}

    def answer(planned, layers):
        return factors[layers[0].name] * spent[layers[0].name], 0.0

    measure_as(monkeypatch, answer)
    monkeypatch.setattr(planning, "REMEASURED_LAYERS", 2)
    left = spent[order[1]] + spent[order[2]]
    expected = {order[0]: 3.0, order[1]: 4.0, order[2]: 4.0}
    assert corrections(planner, planned, 3 * spent[order[0]] + 4 * left) == pytest.approx(expected, rel=0.03)
    expected = {order[0]: 3.0, order[1]: 1.0, order[2]: 1.0}
    assert corrections(planner, planned, 0.0) == pytest.approx(expected, rel=0.02)


def test_nothing_to_correct_where_nothing_is_predicted():
    planner = planner_of()
    kept = first_plan(planner, config_of(loss_budget=0))
    assert {layer.kind for layer in kept.plan.layers.values()} == {"kept"}
    options = planner._options()
    assert corrected_options(planner, options, kept, LossChange(1.0, 0.0)) == options
    measured = planner._measured(kept, planner.problem.layers)
    assert measured == (0, 0) and planner._as_stated(kept, measured)


def test_what_stays_too_high_is_said(monkeypatch, caplog):
    planner = planner_of()
    plans = []
    monkeypatch.setattr(
        Planner, "_plan", lambda *arguments, plan=Planner._plan: plans.append(plan(*arguments)) or plans[-1]
    )
    measure_as(monkeypatch, lambda planned, layers: (100 * (1 + planned.plan.predicted_loss_change), 0.0))
    with caplog.at_level(logging.INFO, "hf_lossless.planning.planner"):
        planned = planner.plan(config_of(ratio=7).target)
    assert planned.plan is plans[-1].plan and len(plans) == 1 + planning.REPLANS
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["the loss rises by more than predicted, also after 2 new plans"]
    assert sum("predicted change of the loss" in record.getMessage() for record in caplog.records) == 3


def test_a_loss_that_overflows_with_the_planned_weights():
    """It is found out however small the prediction was."""
    model = network()
    original = model[0].weight.detach().clone()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        far = (model[0].weight - original).norm() > 0.1 * original.norm()
        return batch_loss(model, batch) * (torch.inf if far else 1.0)

    planner = analyse(model, BATCHES, config_of(ratio=2, bits=(1, 8, 16)), loss=loss)
    small = {"0": scaled(planner.predictions, 1e-6)["0"]}
    planner = dataclasses.replace(planner, predictions={**planner.predictions, **small})
    config = config_of(ratio=3.5, bits=(1, 8, 16))
    assert first_plan(planner, config).plan.layers["0"].bits == 1
    planned = planner.plan(config.target)
    assert planned.plan.layers["0"].bits == 8
    assert math.isfinite(planner._measured(planned, planner.problem.layers).mean)


def test_a_gain_that_was_predicted_never_grows(monkeypatch):
    """CET and HAWQ may predict that the loss falls; where a plan was worse than predicted, that is no better."""
    planner = planner_of()
    predictions = {
        name: [dataclasses.replace(one, loss_change=one.loss_change - 1e-4) for one in group]
        for name, group in planner.predictions.items()
    }
    planner = dataclasses.replace(planner, predictions=predictions)
    planned = first_plan(planner, config_of(ratio=8))
    measure_as(monkeypatch, lambda planned, layers: (1.0, 0.0))
    options = planner._options()
    before, after = changes(options), changes(corrected_options(planner, options, planned, LossChange(1.0, 0.0)))
    assert after != before
    for name, group in after.items():
        assert all(new >= old for new, old in zip(group, before[name], strict=True))


def test_a_budget_that_only_a_wrong_prediction_met(monkeypatch):
    """What is found out may be that there is no plan; the model stays as it was."""
    predict_times(monkeypatch, 1e-9)
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnreachableTargetError, match=r"loss_budget=0\.01 cannot be met: the least predicted loss"):
        compress(model, BATCHES, config_of(loss_budget=0.01, bits=(1,)))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_errors_are_those_of_what_is_stored():
    """By feedback, to nearest, as factors, as a sum, and none of a kept layer."""
    config = config_of(ratio=2, ranks="auto", bits=(2, 4, 16))
    planner = analyse(network(), BATCHES, config)
    seen = set()
    for ratio in (1.2, 2, 4, 6, 8, 10):
        config = config_of(ratio=ratio, ranks="auto", bits=(2, 4, 16))
        planned = planner.plan(config.target)
        twin = network()
        apply(twin, planned.stored)
        for layer in planner.problem.layers:
            module = twin.get_submodule(layer.name)
            stored = module.weight if isinstance(module, nn.Linear) else module.matrix()
            error = planned.error(layer)
            assert error.dtype == torch.float32 and error.shape == layer.matrix.shape
            torch.testing.assert_close(error, (stored - layer.matrix).detach(), rtol=1e-4, atol=1e-5)
            plan = planned.plan.layers[layer.name]
            seen.add((plan.kind, plan.grid and plan.grid.rounding))
    assert {"kept", "grid"} <= {kind for kind, _ in seen}
    assert ("grid", "feedback") in seen


def coded_config(**settings) -> LosslessCompressionConfig:
    return config_of(**{"storage": ("fixed", "entropy"), **settings})


def coded_planner(**settings) -> Planner:
    return analyse(network(), BATCHES, coded_config(ratio=2, **settings))


@functools.cache
def shared_planner(storage: tuple[str, ...]) -> Planner:
    """One that many tests ask for plans; what it has rounded before is no part of its promise."""
    return coded_planner(storage=storage)


def is_rounded(planned: Planned) -> None:
    """Every coded layer is there, on its grid, and the plan has the bytes that it takes."""
    assert {name: one.plan for name, one in planned.stored.items()} == planned.plan.layers
    for one in planned.stored.values():
        assert isinstance(one.values, EncodedMatrix) == (one.plan.kind == "coded")
        if isinstance(one.values, EncodedMatrix):
            activation = 0 if one.plan.activation is None else one.plan.activation.stored_bytes
            assert one.plan.cost_bytes == len(one.values.stored) + activation


def coded_values(planned: Planned) -> dict[str, EncodedMatrix]:
    return {name: one.values for name, one in planned.stored.items() if isinstance(one.values, EncodedMatrix)}


TARGETS = [{"ratio": 3}, {"ratio": 9}, {"loss_budget": 0.01}, {"loss_budget": 1e9}, {"max_bytes": 5000}]


@pytest.mark.parametrize("storage", [("entropy",), ("fixed", "entropy")], ids="+".join)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_coded_plans_have_the_bytes_on_disk(storage, target):
    config = coded_config(storage=storage, **target)
    planner = shared_planner(storage)
    planned = planner.plan(config.target)
    is_rounded(planned)
    assert coded_values(planned) or "fixed" in storage
    size_bytes = LosslessCheckpointConfig.of(planned.plan).size_bytes
    if "ratio" in target:
        assert planner.original_bytes / size_bytes >= target["ratio"]
    if "max_bytes" in target:
        assert size_bytes <= 5000
    if "loss_budget" in target:
        assert planned.plan.predicted_loss_change <= target["loss_budget"]


def test_one_analysis_serves_many_coded_plans():
    planner = coded_planner()
    configs = [coded_config(**target) for target in (*TARGETS, TARGETS[0])]
    plans = []
    for config in configs:
        planned = planner.plan(config.target)
        is_rounded(planned)
        assert planner._coded.keys() == coded_values(planned).keys()  # what is not planned is let go
        plans.append(planned)
    for planned in plans:
        is_rounded(planned)  # and what was planned first keeps its codes
    assert plans[0].plan.tensor_bytes > plans[1].plan.tensor_bytes
    assert LosslessCheckpointConfig.of(plans[-1].plan).size_bytes <= planner.original_bytes / 3


def test_a_layer_that_is_held_on_its_grid_is_not_rounded_again(monkeypatch):
    planner = coded_planner()
    rounded: list[tuple] = []

    def counted(layers, grids, calibration, round_coded=planning.round_coded):
        assert not any(name in planner._coded and planner._coded[name].grid == grid for name, grid in grids.items())
        rounded.extend(grids.items())
        return round_coded(layers, grids, calibration)

    monkeypatch.setattr(planning, "round_coded", counted)
    planned = planner.plan(coded_config(ratio=8).target)
    assert (
        len(coded_values(planned)) <= len(rounded) <= (planning.CHOICES_BY_ESTIMATE + 1) * len(planner.problem.layers)
    )
    again = planner.plan(coded_config(ratio=8).target)
    assert again.plan == planned.plan and coded_values(again).keys() == coded_values(planned).keys()
    for name, one in coded_values(planned).items():
        assert coded_values(again)[name].stored.tobytes() == one.stored.tobytes()


@pytest.mark.parametrize("rounds", [1, 2])
def test_planning_ends_with_what_was_rounded(rounds, monkeypatch):
    """However few rounds there are, and however wrong the estimates of bytes."""
    monkeypatch.setattr(planning, "CHOICES_BY_ESTIMATE", rounds)
    planner = coded_planner(storage=("entropy",))
    for group in planner.problem.candidates.values():
        for place, candidate in enumerate(group):
            if candidate.coded is not None:
                wrong = max(1, candidate.cost_bytes * (place % 3 + 1) // 2)
                group[place] = dataclasses.replace(candidate, cost_bytes=wrong)
    is_rounded(planner.plan(coded_config(storage=("entropy",), loss_budget=0.01).target))


def test_the_ratio_named_in_an_error_can_be_reached():
    planner = shared_planner(("entropy",))
    with pytest.raises(UnreachableTargetError, match=r"a ratio of \d") as caught:
        planner.plan(coded_config(storage=("entropy",), ratio=1000).target)
    best = float(re.search(r"a ratio of ([0-9.]+)\.", str(caught.value))[1])
    planned = planner.plan(coded_config(storage=("entropy",), ratio=0.9 * best).target)
    is_rounded(planned)


def test_errors_of_coded_layers_are_those_of_what_is_stored():
    planner = shared_planner(("entropy",))
    planned = planner.plan(coded_config(storage=("entropy",), ratio=8).target)
    twin = copy.deepcopy(planner.problem.model)
    apply(twin, planned.stored)
    for layer in planner.problem.layers:
        assert planned.plan.layers[layer.name].kind == "coded"
        error = planned.error(layer)
        stored = twin.get_submodule(layer.name).matrix()
        torch.testing.assert_close(error, (stored - layer.matrix).detach(), rtol=0, atol=1e-6)
        assert error.abs().max() > 0
    change = sum((batch_loss(twin, batch) - batch_loss(planner.problem.model, batch)).item() for batch in BATCHES)
    measured = planner._measured(planned, planner.problem.layers)
    assert measured.mean == pytest.approx(change / len(BATCHES), abs=1e-5)


def test_codes_that_do_not_fit_the_plan():
    planner = shared_planner(("entropy",))
    first = planner.plan(coded_config(storage=("entropy",), ratio=4).target)
    second = planner.plan(coded_config(storage=("entropy",), ratio=10).target)
    model = network()
    with pytest.raises(
        PlanError, match=r"layer '0' as codes at their entropy, but its values were not given\. Give them"
    ):
        apply_rounded(model, first.plan.layers)
    with pytest.raises(PlanError, match=r"codes layer '0' in \d+ bytes, but its codes take \d+\. Round them"):
        apply_rounded(model, first.plan.layers, rounded=coded_values(second))
    assert all(type(model[place]) is nn.Linear for place in (0, 3, 5))  # nothing was replaced
