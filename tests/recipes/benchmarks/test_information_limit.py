"""The benchmark of the information limit: its parts, and that its committed figures keep to what was asked."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from limit_parts import frontier
from limit_parts.coder import coder_figures
from limit_parts.rate_aware import rate_aware, rounding_with

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.candidates.damping import SHAPED
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.two_sided import round_two_sided
from hf_lossless.storage.entropy.matrix import CodedMatrix, encode
from hf_lossless.storage.values import EncodedMatrix

BENCHMARKS = Path(frontier.__file__).parents[1]
REPORT = json.loads((BENCHMARKS / "information_limit.json").read_text())
FRONTIERS = [name for name, model in REPORT["models"].items() if "storages" in model]


@pytest.mark.parametrize("name", FRONTIERS)
def test_every_plan_keeps_to_its_ratio_and_its_file_to_its_bytes(name):
    """A file has, beside tensors and plan, the header of safetensors and the rest of config.json."""
    rows = [
        (float(ratio), row)
        for storage in REPORT["models"][name]["storages"].values()
        for ratio, row in storage.items()
        if "kl" in row
    ]
    assert rows
    for ratio, row in rows:
        assert row["ratio"] >= ratio - 1e-3
        assert row["size_bytes"] < row["file_bytes"] < row["size_bytes"] + 64_000


@pytest.mark.parametrize("name", FRONTIERS)
def test_plans_lie_above_the_bound_on_their_own_rows(name):
    model = REPORT["models"][name]
    for storage in model["storages"].values():
        for row in storage.values():
            if "kl" in row and row["in_sample"] > 0:
                assert row["bits_above_bound"]["in_sample"] > 0
                assert min(row["bits_above_bound"].values()) > 0


def test_bytes_of_the_bound_lie_between_its_points():
    points = [(100.0, 1e-2), (200.0, 1e-4)]
    assert frontier.bytes_at(1e-3, points) == pytest.approx(150)
    row = {"tensor_bytes": 175, "predicted": 1e-3, "in_sample": 0.0, "damped": 1e-2}
    bounds = {"undamped": points, "damped": [(50.0, 1e-2), (70.0, 1e-4)]}
    assert frontier.bits_above_bound(row, bounds, 100) == {
        "predicted": pytest.approx(2.0),
        "damped": pytest.approx(10.0),
    }


def test_the_gain_is_taken_where_the_divergence_is_the_same():
    fixed = {"6": {"kl": 1e-3, "file_ratio": 6.0}, "8": {"kl": 1.0, "file_ratio": 8.0}, "10": {"unreachable": "why"}}
    entropy = {"6": {"kl": 1e-4, "file_ratio": 6.0}, "12": {"kl": 1e-2, "file_ratio": 12.0}}
    gain = frontier.gain_at_equal_divergence(fixed, entropy)
    assert gain == {"6": pytest.approx(math.sqrt(2))}  # half way along log ratio; no entropy-coded plan has a KL of 1


def test_the_largest_ratio_whose_loss_rose_by_no_more_than_one_standard_error():
    rows = {
        "8": {"kl": 0, "loss_change": -0.1, "loss_change_se": 0.01, "file_ratio": 8},
        "10": {"kl": 0, "loss_change": 0.01, "loss_change_se": 0.01, "file_ratio": 10},
        "12": {"kl": 0, "loss_change": 0.03, "loss_change_se": 0.01, "file_ratio": 12},
        "14": {"unreachable": "why"},
    }
    assert frontier.largest_within_one_error(rows)["file_ratio"] == 10
    assert frontier.largest_within_one_error({"14": rows["14"]}) is None


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(70, 40, generator=generator)
    rows, columns = (torch.randn(3 * size, size, generator=generator) for size in W.shape)
    return W, InverseRoots.of(KroneckerFactors(rows.T @ rows, columns.T @ columns, 1.0), SHAPED)


def _codes(W, roots, step=0.5):
    steps = roots.row_steps(step)[None] * 10, roots.column_steps[None]
    return round_two_sided(W[None], *steps, [roots.rows], [roots.columns])[0]


def test_rounding_that_counts_no_bits_is_that_of_the_package(layer):
    with rounding_with(0.0):
        found = _codes(*layer)
    torch.testing.assert_close(found, _codes(*layer))


def test_rounding_that_counts_bits_chooses_smaller_codes(layer):
    plain = _codes(*layer)
    with rounding_with(1.0):
        assert _codes(*layer).abs().sum() < plain.abs().sum()
    positions = torch.tensor([0.55, -0.55, 0.95, 1.65])
    assert rate_aware(positions, torch.full((4,), 0.7), 1.0).tolist() == [0, -0, 1, 2]
    assert rate_aware(positions, torch.full((4,), 0.7), 0.0).tolist() == [1, -1, 1, 2]


def test_the_parts_of_what_is_stored_add_up():
    codes = np.random.default_rng(0).laplace(scale=2, size=(300, 200)).round().astype(np.int32)
    codes[3, 5] = 1000
    matrix = CodedMatrix.of(codes, np.ones(300, np.float32), np.ones(200, np.float32))
    found = coder_figures([EncodedMatrix(matrix, encode(matrix))])
    assert found["weights"] == 60_000
    assert found["bytes"]["far"] == 8
    assert found["codes_over_entropy"] == pytest.approx(1, abs=0.002)
    assert found["entropy_bytes"] <= found["zeroth_order_entropy_bytes"] * (1 + 1e-12)
    assert found["decoded_weights_per_second"] > 0
