"""What the knapsack may choose from, and how estimates are put right."""

import pytest
import torch
from torch import nn

from hf_lossless.candidates.grids import Candidate
from hf_lossless.errors import CalibrationError
from hf_lossless.planning.options import RoundedCost, options_of, scaled, with_rounded_costs
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.plan import ActivationGrid, CodedGrid, Damping, Grid
from hf_lossless.theories.problem import Prediction
from hf_lossless.theories.quantised_inputs import ActivationOption

LAYER = find_layers(nn.ModuleDict({"layer": nn.Linear(8, 4)}))[0]
DAMPING = Damping(rows=0.3, columns=0.1)


def coded(step: float, cost_bytes: int, expected: float) -> Candidate:
    grid = CodedGrid(step=step, damping=DAMPING, shape=(4, 8))
    return Candidate(None, cost_bytes, coded=grid, expected_cost=expected)


FINE, MIDDLE, COARSE = coded(1.0, 400, 0.01), coded(2.0, 200, 0.04), coded(8.0, 100, 0.5)
CANDIDATES = [Candidate(None, 128), Candidate(Grid(bits=4), 16), FINE, MIDDLE, COARSE]
PREDICTIONS = [Prediction(0.0), Prediction(0.3), Prediction(0.02), Prediction(0.08), Prediction(1.0)]


def options(activations=(), **settings):
    return options_of(LAYER, CANDIDATES, PREDICTIONS, list(activations), **{"may_stay_float": True, **settings})


def numbers(group) -> list[tuple[int, float]]:
    return [(option.plan.cost_bytes, option.plan.predicted_loss_change) for option in group]


def test_one_for_each_candidate():
    group = options()
    assert [option.plan.kind for option in group] == ["kept", "grid", "coded", "coded", "coded"]
    assert [option.candidate for option in group] == CANDIDATES
    assert [option.plan.coded for option in group] == [None, None, FINE.coded, MIDDLE.coded, COARSE.coded]
    assert numbers(group) == [(128, 0.0), (16, 0.3), (400, 0.02), (200, 0.08), (100, 1.0)]


def test_what_the_theory_refuses_is_none():
    predictions = [Prediction(float("inf")), *PREDICTIONS[1:3], Prediction(float("nan")), PREDICTIONS[4]]
    group = options_of(LAYER, CANDIDATES, predictions, [], may_stay_float=True)
    assert [option.candidate for option in group] == [CANDIDATES[1], FINE, COARSE]


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (
            [],
            r"layer 'layer' can be stored in no way: coded it would take no fewer bytes than it takes now\. Add wider",
        ),
        (CANDIDATES[1:2], r"can be stored in no way: at each of \[4\] bits the loss is not finite"),
    ],
    ids=["coded", "fixed"],
)
def test_no_way_at_all(candidates, message):
    predictions = [Prediction(float("inf"))] * len(candidates)
    with pytest.raises(CalibrationError, match=message):
        options_of(LAYER, candidates, predictions, [], may_stay_float=True)


def test_nothing_found_changes_nothing():
    group = options()
    assert with_rounded_costs(group, {}) is group
    other = CodedGrid(step=3.0, damping=DAMPING, shape=(4, 8))
    assert with_rounded_costs(group, {other: RoundedCost(1, 1.0)}) is group


def test_what_was_rounded_has_its_bytes_and_the_others_their_proportion():
    """FINE takes 1.1 times its estimate and costs twice of it; COARSE 0.9 times, and a half."""
    group = with_rounded_costs(options(), {FINE.coded: RoundedCost(440, 0.02), COARSE.coded: RoundedCost(90, 0.25)})
    assert numbers(group) == [
        (128, 0.0),
        (16, 0.3),
        (440, 0.04),
        (220, 0.16),  # like FINE, which is nearer
        (90, 0.5),
    ]
    assert numbers(options()) != numbers(group)


def test_it_starts_from_the_estimates_each_time():
    once = with_rounded_costs(options(), {FINE.coded: RoundedCost(440, 0.02)})
    assert numbers(with_rounded_costs(options(), {FINE.coded: RoundedCost(440, 0.02)})) == numbers(once)
    assert [option.candidate for option in once] == CANDIDATES


@pytest.mark.parametrize(("cost", "factor"), [(0.0, 0.01), (1e9, 100.0)], ids=["nothing", "very-much"])
def test_corrections_have_a_limit(cost, factor):
    group = with_rounded_costs(options(), {FINE.coded: RoundedCost(400, cost)})
    assert [change for _, change in numbers(group)[2:]] == pytest.approx([0.02 * factor, 0.08 * factor, factor])


def test_bytes_of_the_input_stay():
    activation = ActivationOption(ActivationGrid(bits=8, range="static"), 0.0)
    group = options([activation], may_stay_float=False)
    assert [cost for cost, _ in numbers(group)] == [128, 21, 405, 205, 105]
    right = with_rounded_costs(group, {FINE.coded: RoundedCost(440, 0.01)})
    assert [cost for cost, _ in numbers(right)] == [128, 21, 445, 225, 115]
    assert all(option.plan.activation == activation.grid for option in right[1:])


def test_only_a_rise_is_scaled():
    group = options_of(LAYER, CANDIDATES[1:3], [Prediction(-0.1), Prediction(0.2)], [], may_stay_float=True)
    assert [change for _, change in numbers(scaled(one, 3.0) for one in group)] == [-0.1, 0.6]
    assert [scaled(one, 3.0).candidate for one in group] == CANDIDATES[1:3]


def test_predictions_are_short_in_the_plan():
    group = options_of(LAYER, [FINE], [Prediction(0.123456789)], [], may_stay_float=True)
    assert group[0].plan.predicted_loss_change == 0.1235
    assert torch.equal(LAYER.matrix, LAYER.weight)


def test_tiny_costs_are_put_right_in_proportion():
    """The predictions of rows that the model knows by heart may be 1e-80 nats, and one twice another all the same."""
    fine = coded(1.0, 400, 1e-80)
    group = options_of(LAYER, [fine], [Prediction(2e-80)], [], may_stay_float=True)
    [right] = with_rounded_costs(group, {fine.coded: RoundedCost(440, 3e-80)})
    assert right.plan.predicted_loss_change == pytest.approx(6e-80)
