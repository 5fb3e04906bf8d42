"""What coded grids cost on rows that did not shape them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from metrics_by_hand import curvature_of, second_moments
from torch import nn

from hf_lossless.calibration.curvature import KroneckerFactors, second_order_change
from hf_lossless.calibration.statistics import LayerStatistics, Moments
from hf_lossless.candidates.coded import propose_coded
from hf_lossless.candidates.grids import Candidate
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.shaped import Judge, Sample, stored_steps, try_step
from hf_lossless.candidates.two_sided import round_two_sided
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.theories.coded_rounding import REFERENCE_BITS, coded_changes

OUT, IN = 64, 48


def layers() -> list[Layer]:
    torch.manual_seed(0)
    return find_layers(nn.ModuleDict({"one": nn.Linear(IN, OUT), "two": nn.Linear(IN, OUT)}))


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


def problem(of_layers: dict[str, LayerStatistics], seed: int = 5) -> SimpleNamespace:
    """As much of a `Problem` as is looked at."""
    candidates = {
        layer.name: [
            Candidate(None, layer.weight.nbytes),
            *propose_coded(layer, of_layers[layer.name], seed=0, damping_scale=1.0),
        ]
        for layer in layers()
    }
    calibration = SimpleNamespace(layers=of_layers)
    return SimpleNamespace(layers=layers(), candidates=candidates, calibration=calibration, seed=seed)


def reference(candidates: list[Candidate]) -> Candidate:
    coded = [candidate for candidate in candidates if candidate.coded is not None]
    return min(coded, key=lambda one: abs(8 * one.cost_bytes / (OUT * IN) - REFERENCE_BITS))


def judged(layer: Layer, candidate: Candidate, of_layer: LayerStatistics) -> float:
    """Fitted to one half and judged by the other, both ways round, as estimated from samples."""
    cost = 0.0
    for fit, judge in (of_layer.halves, of_layer.halves[::-1]):
        roots = InverseRoots.of(fit, candidate.coded.damping)
        sample = Sample.of(layer.matrix, roots, torch.Generator().manual_seed(5))
        cost += Judge.of(judge, sample, roots).cost(candidate.coded.step, try_step(candidate.coded.step, sample, roots))
    return cost / 2


def in_full(layer: Layer, candidate: Candidate, of_layer: LayerStatistics) -> float:
    """The same with all rows rounded."""
    cost, matrix = 0.0, layer.matrix.detach()
    for fit, judge in (of_layer.halves, of_layer.halves[::-1]):
        roots = InverseRoots.of(fit, candidate.coded.damping)
        rows, columns = stored_steps(roots.row_steps(candidate.coded.step)), stored_steps(roots.column_steps)
        [codes] = round_two_sided(matrix[None], rows[None], columns[None], [roots.rows], [roots.columns])
        cost += second_order_change(codes * rows[:, None] * columns - matrix, judge)
    return cost / 2


@pytest.mark.parametrize("cost_of", [judged, in_full], ids=["sampled", "in-full"])
def test_one_factor_for_all_candidates(cost_of):
    of_layers = {"one": statistics("measured"), "two": statistics("measured")}
    asked = problem(of_layers)
    changes = coded_changes(asked)
    damped = found = 0.0
    for layer in asked.layers:
        candidate = reference(asked.candidates[layer.name])
        damped += candidate.expected_cost
        found += cost_of(layer, candidate, of_layers[layer.name])
    kappa = found / damped
    for name, group in asked.candidates.items():
        coded = {one.coded: kappa * one.expected_cost for one in group if one.coded is not None}
        assert changes[name] == pytest.approx(coded, rel=1e-6 if cost_of is judged else 0.1) and len(coded) > 10


def test_a_layer_without_two_halves_speaks_for_itself():
    nothing = dataclasses.replace(curvature_of(OUT, IN), scale=0.0)
    for halves in (None, (curvature_of(OUT, IN), nothing)):
        of_layers = {"one": statistics(halves), "two": statistics(halves)}
        asked = problem(of_layers)
        for name, changes in coded_changes(asked).items():
            expected = {one.coded: one.expected_cost for one in asked.candidates[name] if one.coded is not None}
            assert changes == pytest.approx(expected) and len(expected) > 10


def test_without_coded_grids_there_is_nothing_to_say():
    asked = problem({"one": statistics("measured"), "two": statistics("measured")})
    asked.candidates["one"] = asked.candidates["one"][:1]
    assert coded_changes(asked)["one"] == {} and coded_changes(asked)["two"]
    asked.candidates["two"] = asked.candidates["two"][:1]
    assert coded_changes(asked) == {"one": {}, "two": {}}


def test_layers_of_zeros_cost_nothing():
    asked = problem({"one": statistics("measured"), "two": statistics("measured")})
    with torch.no_grad():
        for layer in asked.layers:
            layer.weight.zero_()
    for layer in asked.layers:
        asked.candidates[layer.name] = propose_coded(
            layer, asked.calibration.layers[layer.name], seed=0, damping_scale=1.0
        )
    for changes in coded_changes(asked).values():
        assert changes and not any(changes.values())
