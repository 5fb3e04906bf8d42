"""Coded layers of a plan: each as it would be alone, its bytes and what it costs."""

import numpy as np
import pytest
import torch
from metrics_by_hand import dense
from test_round_packed import prepared

from hf_lossless.calibration.statistics import Calibration
from hf_lossless.candidates import round_coded as module_under_test
from hf_lossless.candidates.coded import propose_coded
from hf_lossless.candidates.damping import SHAPED, SHAPED_OF_EMBEDDINGS, shaped_damping
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.round_coded import round_coded
from hf_lossless.candidates.shaped import step_at, stored_steps
from hf_lossless.candidates.two_sided import round_two_sided
from hf_lossless.storage.entropy.matrix import LARGEST_CODE, decode
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import CodedGrid

NAMES = ["embedding", "conv", "first", "second", "head"]


def grid_of(layer: Layer, calibration: Calibration, resolution: float = 6.0) -> CodedGrid:
    out_features, in_features = layer.matrix.shape
    damping = shaped_damping(layer.kind, 1.0)
    step = step_at(resolution, layer.matrix, InverseRoots.of(calibration.layers[layer.name].curvature, damping))
    return CodedGrid(step=step, damping=damping, shape=(out_features, in_features))


@pytest.mark.parametrize("largest_batch", [1, 2**23], ids=["one-by-one", "together"])
def test_each_layer_as_it_is_alone(largest_batch, monkeypatch):
    monkeypatch.setattr(module_under_test, "_LARGEST_BATCH", largest_batch)
    layers, calibration = prepared()
    grids = {name: grid_of(layers[name], calibration) for name in NAMES}
    found = round_coded(list(layers.values()), grids, calibration)
    assert found.keys() == set(NAMES)
    for name, one in found.items():
        matrix, curvature = layers[name].matrix.detach(), calibration.layers[name].curvature
        assert grids[name].damping == (SHAPED_OF_EMBEDDINGS if name == "embedding" else SHAPED)
        roots = InverseRoots.of(curvature, grids[name].damping)
        rows, columns = stored_steps(roots.row_steps(grids[name].step)), stored_steps(roots.column_steps)
        [codes] = round_two_sided(matrix[None], rows[None], columns[None], [roots.rows], [roots.columns])
        expected = codes * columns * rows[:, None]
        assert one.grid == grids[name] and codes.any()
        assert torch.equal(one.values.dense, expected) and not one.values.dense.requires_grad
        damping = grids[name].damping
        R, C = dense(curvature.rows, damping.rows), dense(curvature.columns, damping.columns)
        d = (expected - matrix).double()
        assert one.cost == pytest.approx(0.5 * curvature.scale * (R @ d @ C @ d.mT).trace().item(), rel=1e-3)
        again = decode(one.values.stored, tuple(matrix.shape))
        assert np.array_equal(again.codes, one.values.matrix.codes)
        assert np.array_equal(again.far_codes, one.values.matrix.far_codes)
        assert np.array_equal(again.row_steps, rows.numpy()) and np.array_equal(again.column_steps, columns.numpy())


def test_only_what_has_a_grid():
    layers, calibration = prepared()
    assert round_coded(list(layers.values()), {}, calibration) == {}
    found = round_coded(list(layers.values()), {"first": grid_of(layers["first"], calibration)}, calibration)
    assert list(found) == ["first"]


def test_layers_with_a_diagonal_metric_beside_those_with_a_full_one(monkeypatch):
    monkeypatch.setattr("hf_lossless.calibration.curvature.LARGEST_FACTOR", 6)
    layers, calibration = prepared()
    factors = {name: calibration.layers[name].curvature for name in NAMES}
    assert len({(one.rows.ndim, one.columns.ndim) for one in factors.values()}) >= 3
    grids = {name: grid_of(layers[name], calibration) for name in NAMES}
    together = round_coded(list(layers.values()), grids, calibration)
    for name, grid in grids.items():
        alone = round_coded(list(layers.values()), {name: grid}, calibration)[name]
        assert np.array_equal(alone.values.stored, together[name].values.stored)


def test_far_codes_are_kept_exactly_up_to_the_largest():
    layers, calibration = prepared()
    grid = grid_of(layers["first"], calibration)
    with torch.no_grad():
        layers["first"].weight[0, :2] = torch.tensor([3e4, -9e9])
    [one] = round_coded([layers["first"]], {"first": grid}, calibration).values()
    assert len(one.values.matrix.far_codes) >= 2 and np.abs(one.values.matrix.far_codes).max() == LARGEST_CODE
    error = (one.values.dense - layers["first"].matrix)[0, 0].abs()
    assert (
        error <= one.values.matrix.row_steps[0] * one.values.matrix.column_steps[0] * 40
    )  # the other's overflow is fed back to it
    found = decode(one.values.stored, (12, 12))
    assert np.array_equal(found.far_codes, one.values.matrix.far_codes)


def test_what_is_proposed_is_near_what_it_becomes():
    layers, calibration = prepared()
    for name in NAMES:
        candidates = propose_coded(layers[name], calibration.layers[name], seed=0, damping_scale=1.0)
        costs = [one.cost_bytes for one in candidates]
        assert costs[0] == max(costs) < layers[name].weight.nbytes
        assert [one.kind for one in candidates] == ["coded"] * len(costs)
        steps = [one.coded.step for one in candidates]
        assert steps == sorted(steps)
        candidate = candidates[0]
        [one] = round_coded([layers[name]], {name: candidate.coded}, calibration).values()
        # The models' bytes are only guessed, and with a hundred weights they are a half of it.
        assert 0.5 * one.cost_bytes <= candidate.cost_bytes <= 1.1 * len(one.values.stored)
        assert one.cost == pytest.approx(candidate.expected_cost, rel=0.7)


def test_the_same_seed_proposes_the_same():
    layers, calibration = prepared()
    first, again = (
        propose_coded(layers["second"], calibration.layers["second"], seed=3, damping_scale=1.0) for _ in range(2)
    )
    assert first == again


def test_nothing_is_proposed_for_a_layer_that_no_gradient_reaches():
    layers, calibration = prepared()
    assert propose_coded(layers["idle"], calibration.layers["idle"], seed=0, damping_scale=1.0) == []


def test_dampings_are_multiplied_by_the_scale():
    layers, calibration = prepared()
    for name, default in {"first": SHAPED, "embedding": SHAPED_OF_EMBEDDINGS}.items():
        [one, *_] = propose_coded(layers[name], calibration.layers[name], seed=0, damping_scale=3.0)
        assert one.coded.damping == shaped_damping(layers[name].kind, 3.0)
        assert one.coded.damping.rows == 3 * default.rows and one.coded.damping.columns == 3 * default.columns
