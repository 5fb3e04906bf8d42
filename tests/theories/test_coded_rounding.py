"""What coded grids cost on rows that did not shape them."""

import dataclasses

import pytest
import torch
from metrics_by_hand import DAMPING, curvature_of, second_moments
from torch import nn

from hf_lossless.calibration.curvature import KroneckerFactors, second_order_change
from hf_lossless.calibration.statistics import LayerStatistics, Moments
from hf_lossless.candidates.coded import propose_coded
from hf_lossless.candidates.shaped import Sample, expected_cost, stored_steps, try_step
from hf_lossless.candidates.sides import Sides
from hf_lossless.candidates.two_sided import round_two_sided
from hf_lossless.layers import Layer, find_layers
from hf_lossless.theories.coded_rounding import coded_changes

OUT, IN = 64, 48


def layer() -> Layer:
    torch.manual_seed(0)
    return find_layers(nn.ModuleDict({"layer": nn.Linear(IN, OUT)}))[0]


def factors(columns) -> KroneckerFactors:
    return KroneckerFactors(second_moments(OUT, 1), columns / columns.diagonal().mean(), 0.4)


def statistics(halves=None) -> LayerStatistics:
    """The halves' columns are second moments of a few rows each, the whole is their mean."""
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(second_moments(IN, 2))
    inputs = [torch.randn(IN // 2, IN, generator=generator) @ root.mT for _ in range(2)]
    of_half = [one.mT @ one / len(one) for one in inputs]
    whole = factors(sum(of_half) / 2)
    if halves == "measured":
        halves = tuple(map(factors, of_half))
    return LayerStatistics(calls=1, inputs=None, weight_gradient=Moments(0.0, 1.0, 10), curvature=whole, halves=halves)


def test_each_half_is_judged_by_the_other():
    of_layer = statistics("measured")
    candidates = propose_coded(layer(), of_layer, seed=0)
    changes = coded_changes(layer(), candidates, of_layer, seed=5)
    assert list(changes) == [one.coded for one in candidates]
    matrix = layer().matrix.detach()
    for candidate in candidates[::5]:
        expected = 0.0
        for fit, judge in (of_layer.halves, of_layer.halves[::-1]):
            sides = Sides.of(fit, candidate.coded.damping)
            sample = Sample.of(matrix, sides, torch.Generator().manual_seed(5))
            trial = try_step(candidate.coded.step, sample, sides)
            expected += expected_cost(candidate.coded.step, trial, sample, sides, judge) / 2
        assert changes[candidate.coded] == pytest.approx(expected, rel=1e-6)


def test_it_is_what_rounding_on_one_half_costs_on_the_other():
    of_layer = statistics("measured")
    candidates = propose_coded(layer(), of_layer, seed=0)
    changes = coded_changes(layer(), candidates, of_layer, seed=0)
    matrix = layer().matrix.detach()
    for candidate in candidates[:8:3]:  # at high rate
        found = 0.0
        for fit, judge in (of_layer.halves, of_layer.halves[::-1]):
            sides = Sides.of(fit, candidate.coded.damping)
            rows, columns = stored_steps(sides.row_steps(candidate.coded.step)), stored_steps(sides.column_steps)
            [codes] = round_two_sided(matrix[None], rows[None], columns[None], [sides.rows], [sides.columns])
            found += second_order_change(codes * rows[:, None] * columns - matrix, judge) / 2
        assert changes[candidate.coded] == pytest.approx(found, rel=0.1)
        assert found > 1.3 * candidate.expected_cost  # the rows that shaped a grid speak too well of it


@pytest.mark.parametrize("halves", ["none", "one-is-zero"])
def test_without_two_halves_it_is_what_all_rows_expect(halves):
    of_layer = statistics()
    if halves == "one-is-zero":
        nothing = dataclasses.replace(curvature_of(OUT, IN), scale=0.0)
        of_layer = statistics((curvature_of(OUT, IN), nothing))
    candidates = propose_coded(layer(), of_layer, seed=0)
    changes = coded_changes(layer(), candidates, of_layer, seed=0)
    assert changes == {one.coded: one.expected_cost for one in candidates} and len(changes) > 10


def test_without_coded_grids_there_is_nothing_to_say():
    assert coded_changes(layer(), [], statistics("measured"), seed=0) == {}


def test_the_damping_is_that_of_the_grids():
    candidates = propose_coded(layer(), statistics(), seed=0)
    assert {one.coded.damping for one in candidates} == {DAMPING}
