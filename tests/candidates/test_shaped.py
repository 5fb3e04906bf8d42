"""What shaped grids are said to take and to cost, against what they take and cost once all rows are rounded."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from metrics_by_hand import DAMPING, curvature_of, dense
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors, second_order_change
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.shaped import (
    SAMPLED_ROWS,
    Judge,
    Sample,
    Trial,
    coded_bytes,
    ladder,
    step_at,
    stored_steps,
    try_step,
)
from hf_lossless.candidates.two_sided import round_two_sided
from hf_lossless.storage.entropy.matrix import CodedMatrix, encode

SHAPES = pytest.mark.parametrize("shape", [(96, 64), (64, 200), (300, 80)], ids=str)
DIAGONALS = pytest.mark.parametrize("diagonal", ["", "rows", "columns"], ids=["full", "rows", "columns"])


def weights_of(shape) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator) * torch.randn(shape[1], generator=generator).exp()


def expected_cost(step: float, trial: Trial, sample: Sample, roots: InverseRoots, judge: KroneckerFactors) -> float:
    return Judge.of(judge, sample, roots).cost(step, trial)


def prepared(shape, diagonal: str = "") -> tuple[Tensor, KroneckerFactors, InverseRoots, Sample]:
    matrix, curvature = weights_of(shape), curvature_of(*shape, seed=3, diagonal=diagonal)
    roots = InverseRoots.of(curvature, DAMPING)
    return matrix, curvature, roots, Sample.of(matrix, roots, torch.Generator().manual_seed(0))


def in_full(step: float, matrix: Tensor, roots: InverseRoots) -> tuple[Tensor, int]:
    """The error of all rows, and their bytes."""
    rows, columns = stored_steps(roots.row_steps(step)), stored_steps(roots.column_steps)
    [codes] = round_two_sided(matrix[None], rows[None], columns[None], [roots.rows], [roots.columns])
    coded = CodedMatrix.of(codes.to(torch.int32).numpy(), rows.numpy(), columns.numpy())
    return codes * rows[:, None] * columns - matrix, len(encode(coded))


def damped(curvature: KroneckerFactors) -> KroneckerFactors:
    rows, columns = dense(curvature.rows, DAMPING.rows), dense(curvature.columns, DAMPING.columns)
    return KroneckerFactors(rows.float(), columns.float(), curvature.scale)


@DIAGONALS
@SHAPES
def test_estimates_are_near_what_is_found(shape, diagonal):
    """From 1.4 bits a weight on; below, feedback brings more than normal noise of its variance says."""
    matrix, curvature, roots, sample = prepared(shape, diagonal)
    tried = 0
    for step in ladder(matrix, roots)[::2]:
        error, num_bytes = in_full(step, matrix, roots)
        if 8 * num_bytes / matrix.numel() < 1.4:
            continue
        tried += 1
        trial = try_step(step, sample, roots)
        assert coded_bytes(step, trial, sample, roots) == pytest.approx(num_bytes, rel=0.075)
        expected = expected_cost(step, trial, sample, roots, curvature)
        assert expected == pytest.approx(second_order_change(error, curvature), rel=0.1)
    assert tried >= 6


@SHAPES
def test_another_judge(shape):
    """One that has nothing to do with what shaped the steps, at a rate where errors are independent."""
    matrix, _, roots, sample = prepared(shape)
    step = step_at(40.0, matrix, roots)
    error, _ = in_full(step, matrix, roots)
    trial = try_step(step, sample, roots)
    judges = [curvature_of(*shape, seed=seed) for seed in range(10, 15)]
    expected = sum(expected_cost(step, trial, sample, roots, judge) for judge in judges)
    assert expected == pytest.approx(sum(second_order_change(error, judge) for judge in judges), rel=0.1)


@SHAPES
def test_at_full_rate_every_weight_costs_the_same(shape):
    matrix, curvature, roots, sample = prepared(shape)
    step = step_at(40.0, matrix, roots)
    each = step**2 / 24
    of_all = matrix.numel() * each
    error, _ = in_full(step, matrix, roots)
    assert second_order_change(error, damped(curvature)) == pytest.approx(of_all, rel=0.05)
    trial = try_step(step, sample, roots)
    assert expected_cost(step, trial, sample, roots, damped(curvature)) == pytest.approx(of_all, rel=0.07)
    assert trial.cost(step, sample.share) == pytest.approx(of_all, rel=0.07)


def test_a_resolution_is_root_mean_square_over_geometric_mean():
    matrix, _, roots, _ = prepared((20, 30))
    step = step_at(4.0, matrix, roots)
    steps = roots.row_steps(step)[:, None] * roots.column_steps
    assert matrix.square().mean().sqrt().item() / steps.log().mean().exp().item() == pytest.approx(4.0, rel=1e-4)


def test_the_ladder_is_of_exact_powers_that_all_layers_share():
    for seed in range(4):
        matrix = weights_of((16, 24)) * 3.0**-seed
        roots = InverseRoots.of(curvature_of(16, 24, seed=seed, scale=10.0**-seed), DAMPING)
        steps = ladder(matrix, roots)
        assert steps == sorted(steps) and len(steps) in (17, 18, 19)
        for step in steps:
            assert step in (2.0 ** round(math.log2(step)), 2.0 ** (math.floor(math.log2(step)) + 0.5))
        assert steps[0] >= step_at(64.0, matrix, roots) * (1 - 1e-9)
        assert steps[-1] < step_at(1 / 8, matrix, roots)


def test_coarser_steps_take_less_and_cost_more():
    matrix, curvature, roots, sample = prepared((96, 64))
    found = []
    for step in ladder(matrix, roots):
        trial = try_step(step, sample, roots)
        found.append((coded_bytes(step, trial, sample, roots), expected_cost(step, trial, sample, roots, curvature)))
    num_bytes, costs = zip(*found, strict=True)
    assert list(num_bytes) == sorted(num_bytes, reverse=True) and list(costs) == sorted(costs)


def test_a_sample_has_rows_of_every_curvature():
    matrix, _, roots, sample = prepared((300, 40))
    assert len(sample.rows) == SAMPLED_ROWS == len(set(sample.rows.tolist())) and sample.share == 300 / SAMPLED_ROWS
    assert torch.equal(sample.weights, matrix[sample.rows])
    spreads = roots.rows.unit_steps
    assert spreads[sample.rows].mean().item() == pytest.approx(spreads.mean().item(), rel=0.02)
    # Every row has one of like curvature that stands for it, and each of the sample stands for two or three.
    of_row = spreads[sample.rows][sample.stand_ins]
    assert (of_row.log() - spreads.log()).abs().mean() < 0.02
    assert set(torch.bincount(sample.stand_ins).tolist()) == {2, 3}
    assert torch.equal(sample.stand_ins[sample.rows], torch.arange(SAMPLED_ROWS))


def test_a_small_layer_is_its_own_sample():
    matrix, _, _, sample = prepared((20, 40))
    assert sorted(sample.rows.tolist()) == list(range(20)) and sample.share == 1
    assert torch.equal(sample.weights, matrix[sample.rows])


def test_steps_are_tried_as_they_are_stored():
    steps = torch.tensor([1.03, 0.26, 7.9])
    assert stored_steps(steps).tolist() == [1.0, 0.25, 8.0]


def test_a_layer_of_zeros():
    roots = InverseRoots.of(curvature_of(6, 9), DAMPING)
    matrix = torch.zeros(6, 9)
    sample = Sample.of(matrix, roots, torch.Generator().manual_seed(0))
    for step in ladder(matrix, roots):
        trial = try_step(step, sample, roots)
        assert not trial.codes.any() and not trial.errors.any()
        assert expected_cost(step, trial, sample, roots, curvature_of(6, 9)) == 0
        error, num_bytes = in_full(step, matrix, roots)
        assert not error.any() and num_bytes < 100
        assert coded_bytes(step, trial, sample, roots) <= num_bytes


def test_codes_beyond_a_byte_are_counted():
    """A few weights a thousand times as large as the others."""
    matrix, _, roots, _ = prepared((64, 96))
    matrix[::16, ::12] *= 3000
    sample = Sample.of(matrix, roots, torch.Generator().manual_seed(0))
    step = step_at(400.0, matrix, roots)
    trial = try_step(step, sample, roots)
    assert (trial.codes.abs() > 127).sum() >= 20
    _, num_bytes = in_full(step, matrix, roots)
    assert coded_bytes(step, trial, sample, roots) == pytest.approx(num_bytes, rel=0.075)
    assert np.isfinite(trial.errors.numpy()).all()


@pytest.mark.parametrize("power", [-500, -240, -170, -20, 0, 20, 170, 240, 500])
def test_steps_do_not_depend_on_the_size_of_the_loss(power):
    """A loss k times as large has k^2 times the scale, and k times the c; what is tried is the same."""
    matrix, curvature, sides, sample = prepared((40, 24))
    scaled = dataclasses.replace(sides, scale=curvature.scale * 2.0**power)
    larger = 2.0 ** (power / 2)
    assert step_at(1.0, matrix, scaled) == pytest.approx(larger * step_at(1.0, matrix, sides), rel=1e-5)
    assert ladder(matrix, scaled) == pytest.approx([larger * step for step in ladder(matrix, sides)], rel=1e-12)
    first, second = ladder(matrix, sides)[5], ladder(matrix, scaled)[5]
    assert torch.equal(try_step(second, sample, scaled).codes, try_step(first, sample, sides).codes)
    cost = try_step(first, sample, sides).cost(first, 1.0)
    assert try_step(second, sample, scaled).cost(second, 1.0) == pytest.approx(2.0**power * cost, rel=1e-5)
