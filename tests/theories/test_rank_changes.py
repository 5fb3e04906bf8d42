"""Costs of ranks in a metric, against the errors written out; and the optimism that judging by other rows removes."""

import pytest
import torch
from torch import Tensor, nn

from hf_lossless.calibration.curvature import KroneckerFactors, second_order_change
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.candidates import low_rank
from hf_lossless.candidates.low_rank import Whitening, factorise
from hf_lossless.candidates.uniform import on_grid
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.plan import Grid, LowRank
from hf_lossless.theories import rank_changes as truncation
from hf_lossless.theories.rank_changes import RankChanges, changes_of_ranks, rounding_change


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def metric(rows: int, columns: int, seed: int, diagonal: tuple[bool, bool] = (False, False)) -> KroneckerFactors:
    sides = []
    for index, (size, flat) in enumerate(zip((rows, columns), diagonal, strict=True)):
        vectors = random_matrix(2 * size, size, 10 * seed + index)
        moment = vectors.T @ vectors / size
        sides.append(moment.diagonal() if flat else moment)
    return KroneckerFactors(*sides, scale=0.3)


@pytest.mark.parametrize("wide", [False, True], ids=["full", "partial"])
@pytest.mark.parametrize("diagonal", [(False, False), (True, False), (False, True)], ids=["full", "rows", "columns"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (24, 5), (7, 7)], ids=str)
def test_changes_equal_those_of_the_errors_written_out(shape, diagonal, wide, monkeypatch):
    if wide:  # then only the leading components are there, and the rest is one remainder
        monkeypatch.setattr(truncation, "WIDE", 1)
    matrix, judge = random_matrix(*shape), metric(*shape, 2, diagonal)
    fit = Whitening.of(metric(*shape, 1, diagonal))
    largest = min(shape) - 2
    changes = changes_of_ranks(matrix, fit, judge, largest)
    factorisation = factorise(matrix, fit)
    assert changes.shape == (largest + 1,) and changes.dtype == torch.float64
    assert changes[0].item() == pytest.approx(second_order_change(-matrix, judge), rel=1e-4)
    for rank in range(1, largest + 1):
        factors = factorisation.truncated(rank)
        error = factors.left @ factors.right - matrix
        assert changes[rank].item() == pytest.approx(second_order_change(error, judge), rel=1e-4)


def test_in_its_own_metric_more_rank_never_costs_more():
    own = metric(8, 6, 3)
    changes = changes_of_ranks(random_matrix(8, 6), Whitening.of(own, damping=0.0), own, 6)
    assert (changes.diff() <= 1e-6).all() and abs(changes[6].item()) < 1e-4 * changes[0].item()


def test_rank_changes_is_the_mean_of_both_ways():
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    batches = [(random_matrix(16, 12, seed), torch.arange(16) % 3) for seed in range(3)]
    layer = find_layers(model)[0]
    statistics = calibrate(model, batches, [layer], batch_loss, curvature=True).layers["0"]
    even, odd = statistics.halves
    expected = [changes_of_ranks(layer.matrix, Whitening.of(a), b, 4) for a, b in ((even, odd), (odd, even))]
    torch.testing.assert_close(RankChanges(statistics).changes(layer.matrix, 4), (expected[0] + expected[1]) / 2)

    one = calibrate(model, batches[:1], [layer], batch_loss, curvature=True).layers["0"]
    assert one.halves is None  # one batch: judged by its own rows
    own = changes_of_ranks(layer.matrix, Whitening.of(one.curvature), one.curvature, 4)
    torch.testing.assert_close(RankChanges(one).changes(layer.matrix, 4), own)


def test_the_cut_looks_better_on_the_rows_it_was_made_for():
    """The theorem behind it all: of many inputs that span less than the space, other rows excite other directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 4)).eval()

    def batches(seed: int, rows: int) -> list[tuple[Tensor, Tensor]]:
        inputs = random_matrix(rows, 64, seed)
        return [(part, torch.arange(len(part)) % 4) for part in inputs.split(16)]

    layer = find_layers(model)[0]
    few = calibrate(model, batches(1, 32), [layer], batch_loss, curvature=True).layers["0"]
    many = calibrate(model, batches(2, 4096), [layer], batch_loss, curvature=True).layers["0"]
    for rank in (4, 8):
        factors = factorise(layer.matrix, Whitening.of(few.curvature)).truncated(rank)
        truth = second_order_change(factors.left @ factors.right - layer.matrix, many.curvature)
        own = changes_of_ranks(layer.matrix, Whitening.of(few.curvature), few.curvature, rank)[rank].item()
        crossed = RankChanges(few).changes(layer.matrix, rank)[rank].item()
        assert own < 0.75 * truth, "judged by its own rows the cut looks too good"
        assert 0.8 * truth < crossed < 2 * truth


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (4, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("diagonal", [(False, False), (True, False), (False, True)], ids=["full", "rows", "columns"])
def test_rounding_change_is_the_mean_over_independent_errors(bits, diagonal):
    """dL R + L dR: their own terms to rounding, and little else."""
    judge = metric(40, 30, 4, diagonal)
    factors = factorise(random_matrix(40, 30)).truncated(12)
    left, right = (None if width == 16 else Grid(bits=width) for width in bits)
    change = rounding_change(factors, LowRank(rank=12, shape=(40, 30), left=left, right=right), judge)
    d_left, d_right = on_grid(factors.left, left) - factors.left, on_grid(factors.right, right) - factors.right
    apart = second_order_change(d_left @ factors.right, judge) + second_order_change(factors.left @ d_right, judge)
    assert change == pytest.approx(apart, rel=1e-4)
    rounded = on_grid(factors.left, left) @ on_grid(factors.right, right) - factors.left @ factors.right
    assert change == pytest.approx(second_order_change(rounded, judge), rel=0.35)


def test_the_long_way_round_is_the_svd():
    """Tall and wide matrices take their singular vectors from the Gram matrix of the shorter side."""
    for shape in ((40, 6), (6, 40)):
        matrix = random_matrix(*shape).double()
        U, S, Vt = low_rank._svd_of_long(matrix)
        torch.testing.assert_close(S, torch.linalg.svdvals(matrix))
        torch.testing.assert_close(U * S @ Vt, matrix)
        torch.testing.assert_close(Vt @ Vt.T, torch.eye(6).double())
    deficient = random_matrix(40, 2).double() @ random_matrix(2, 6, 1).double()
    U, S, Vt = low_rank._svd_of_long(deficient)
    torch.testing.assert_close((U * S @ Vt)[:, :], deficient)
    torch.testing.assert_close(U[:, :2] * S[:2] @ Vt[:2], deficient)
    assert torch.isfinite(low_rank._svd_of_long(torch.zeros(9, 2).double())[0]).all()
