"""Candidates with factors: what they cost and what they leave is what the real modules store and compute."""

import itertools

import pytest
import torch
from rounded_plans import apply_rounded
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.calibration.statistics import LayerStatistics, Moments
from hf_lossless.candidates.factored import NARROW_GRID, NARROWEST_FACTOR, propose_factored, propose_sums
from hf_lossless.candidates.grids import Candidate, propose_grids
from hf_lossless.candidates.low_rank import Whitening, factorise
from hf_lossless.candidates.ranks import largest_rank
from hf_lossless.candidates.uniform import on_grid
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.plan import KEPT_BITS, Grid, LayerPlan

MODULES = {
    "linear": lambda: nn.Linear(29, 23),
    "conv1d": lambda: Conv1D(23, 29),
    "conv2d": lambda: nn.Conv2d(5, 17, 3, stride=2),
    "embedding": lambda: nn.Embedding(31, 22),
}
KINDS = pytest.mark.parametrize("kind", MODULES)
ALL_BITS = tuple(range(1, 9))


def layer_of(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Layer:
    torch.manual_seed(seed)
    return find_layers(nn.ModuleDict({"layer": MODULES[kind]().to(dtype)}))[0]


def factored(layer: Layer, ranks=(1, 3, 7), bits=ALL_BITS, group_size: int | None = None, symmetric: bool = True):
    return propose_factored(layer, ranks, factorise(layer.matrix).truncated, bits, group_size, symmetric)


def grids(layer: Layer, bits=ALL_BITS, group_size: int | None = None, symmetric: bool = True) -> list[Candidate]:
    statistics = LayerStatistics(calls=1, inputs=None, weight_gradient=Moments(0.0, 1.0, 10))
    return propose_grids(layer, statistics, bits, group_size, symmetric)


def sums(layer: Layer, bits=ALL_BITS, group_size: int | None = None, symmetric: bool = True) -> list[Candidate]:
    return propose_sums(layer, grids(layer, bits, group_size, symmetric), None, bits, group_size, symmetric)


def widths(candidate: Candidate) -> tuple[int, int]:
    left, right = candidate.low_rank.left, candidate.low_rank.right
    return tuple(KEPT_BITS if one is None else one.bits for one in (left, right))


def applied(layer: Layer, candidate: Candidate) -> nn.Module:
    """The module that stands for the layer when the candidate is chosen."""
    model = nn.ModuleDict({"layer": layer.module})
    plan = LayerPlan(
        kind=candidate.kind,
        grid=candidate.grid,
        low_rank=candidate.low_rank,
        cost_bytes=candidate.cost_bytes,
        predicted_loss_change=0.0,
    )
    return apply_rounded(model, {"layer": plan}, {"layer": candidate.factors})["layer"]


def assert_true(layer: Layer, candidate: Candidate, tolerance: float) -> None:
    """Cost and error are those of the module."""
    assert candidate.cost_bytes < layer.weight.nbytes
    matrix = layer.matrix.detach().clone()
    error = candidate.error(layer.matrix)
    assert error.dtype == torch.float32 and not error.requires_grad
    module = applied(layer, candidate)
    assert module.weight_bytes == candidate.cost_bytes
    size = matrix.float().abs().max().item()
    torch.testing.assert_close(module.matrix().float() - matrix.float(), error, rtol=0, atol=tolerance * size)


@KINDS
@pytest.mark.parametrize("group_size", [None, 5, 8], ids=["row", "g5", "g8"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_cost_and_error_are_those_of_the_module(kind, group_size, symmetric):
    layer = layer_of(kind)
    candidates = factored(layer, group_size=group_size, symmetric=symmetric)
    candidates += sums(layer, group_size=group_size, symmetric=symmetric)
    assert {candidate.kind for candidate in candidates} == {"low_rank", "sum"}
    for candidate in candidates:
        assert_true(layer_of(kind), candidate, 1e-6)


@KINDS
@pytest.mark.parametrize("scale", [1e-12, 1e14], ids=str)
def test_scales_in_float32_are_counted(kind, scale):
    def layer() -> Layer:
        layer = layer_of(kind)
        layer.weight.data *= scale
        return layer

    candidates = factored(layer(), bits=(4, 8)) + sums(layer(), bits=(2, 8))
    parts = [part for one in candidates for part in (one.low_rank.left, one.low_rank.right) if part is not None]
    assert "float32" in {part.scale_dtype for part in parts}
    for candidate in candidates:
        assert_true(layer(), candidate, 1e-6)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_in_half_precision_count_two_bytes(kind, dtype):
    """And the rounding of floating factors to the layer's dtype is part of the error."""
    layer = layer_of(kind, dtype)
    floating = [one for one in factored(layer) if widths(one) == (16, 16)]
    out_features, in_features = layer.matrix.shape
    assert [one.cost_bytes for one in floating] == [rank * (out_features + in_features) * 2 for rank in (1, 3, 7)]
    for candidate in floating:
        fresh = layer_of(kind, dtype)
        error, matrix = candidate.error(fresh.matrix), fresh.matrix.detach().float()
        module = applied(fresh, candidate)
        assert module.weight_bytes == candidate.cost_bytes
        stored = module.left_matrix.float() @ module.right_matrix.float()  # no product is rounded in a forward pass
        torch.testing.assert_close(stored - matrix, error, rtol=0, atol=1e-6 * matrix.abs().max().item())
        exact = candidate.factors.left @ candidate.factors.right - matrix
        assert not torch.equal(error, exact)
    for candidate in factored(layer) + sums(layer):
        assert_true(layer_of(kind, dtype), candidate, 2 * torch.finfo(dtype).eps)


def test_ranks_and_widths():
    layer = layer_of("linear")
    assert NARROWEST_FACTOR == 4
    found = [(one.low_rank.rank, *widths(one)) for one in factored(layer, (3, 7), (2, 3, 4, 8, 16))]
    assert found == [(rank, width, width) for rank in (3, 7) for width in (4, 8, 16)]
    for bits in ((2, 3), (16,), ()):
        assert [widths(one) for one in factored(layer, (3,), bits)] == [(16, 16)]  # a rank needs no grid
    assert {widths(one) for one in factored(layer, (3,), (5, 6))} == {(5, 5), (6, 6), (16, 16)}
    assert all(one.kind == "low_rank" and one.low_rank.shape == (23, 29) for one in factored(layer))
    assert factored(layer, ()) == []


@KINDS
def test_nothing_that_costs_as_much_as_the_layer(kind):
    layer = layer_of(kind)
    out_features, in_features = layer.matrix.shape
    limit = largest_rank(out_features, in_features)
    found = factored(layer, range(1, min(out_features, in_features) + 1))
    assert max(one.cost_bytes for one in found) < layer.weight.nbytes
    floating = [one.low_rank.rank for one in found if widths(one) == (16, 16)]
    assert floating == list(range(1, limit + 1))
    assert max(one.low_rank.rank for one in found) > limit  # in fewer bits a higher rank still saves bytes


def test_groups_of_the_factors():
    """R has the layer's inputs, L the rank's."""
    (candidate,) = [one for one in factored(layer_of("linear"), (7,), (4,), 8, False) if widths(one) == (4, 4)]
    assert candidate.low_rank.left == Grid(bits=4, group_size=None, symmetric=False)  # 8 is more than the rank
    assert candidate.low_rank.right == Grid(bits=4, group_size=8, symmetric=False)


def test_more_rank_and_more_bits_leave_less():
    layer = layer_of("linear")
    errors = {
        (one.low_rank.rank, *widths(one)): one.error(layer.matrix).norm().item()
        for one in factored(layer, range(1, 12), (4, 8))
    }
    for rank, width in itertools.product(range(1, 11), (4, 8, 16)):
        if width > 4:
            assert errors[rank + 1, width, width] < errors[rank, width, width]
    for rank in range(1, 12):
        assert errors[rank, 16, 16] < errors[rank, 8, 8] * 1.001 < errors[rank, 4, 4] * 1.001


# A grid and factors.


def test_sums_have_narrow_grids_and_two_ranks():
    torch.manual_seed(0)
    (layer,) = find_layers(nn.ModuleDict({"layer": nn.Linear(96, 160)}))
    assert largest_rank(160, 96) == 59 and NARROW_GRID == 4
    found = [(one.grid.bits, one.low_rank.rank, *widths(one)) for one in sums(layer, (2, 3, 4, 5, 8, 16))]
    assert found == [(bits, rank, 8, 8) for bits in (2, 3, 4) for rank in (1, 7)]
    assert {widths(one) for one in sums(layer, (2, 4, 16))} == {(16, 16)}
    assert sums(layer, (5, 8, 16)) == [] == sums(layer, (16,))


def test_the_factors_hold_what_the_grid_leaves():
    layer = layer_of("linear")
    bases = {one.grid.bits: one for one in grids(layer) if one.grid is not None}
    for candidate in sums(layer):
        base = bases[candidate.grid.bits]
        assert candidate.grid == base.grid and candidate.cost_bytes > base.cost_bytes
        assert candidate.kind == "sum"
        remainder = layer.matrix.detach() - on_grid(layer.matrix, base.grid)
        rank = candidate.low_rank.rank
        left = torch.linalg.svdvals(remainder.double())[rank:].norm().item()
        error = candidate.error(layer.matrix).norm().item()
        assert left <= error * (1 + 1e-5) and error == pytest.approx(left, rel=0.02)  # the factors have 8 bits
        assert error < base.error(layer.matrix).norm().item()


def test_sums_in_a_metric():
    layer = layer_of("linear")
    out_features, in_features = layer.matrix.shape
    vectors = torch.randn(9, in_features)
    columns = vectors.T @ vectors / 9 + 0.1 * torch.eye(in_features)
    whitening = Whitening.of(KroneckerFactors(torch.ones(out_features), columns, 1.0))

    def cost(candidate: Candidate) -> float:
        error = candidate.error(layer.matrix)
        return (error @ columns @ error.T).trace().item()

    narrow = grids(layer, (2,))
    plain, weighted = (propose_sums(layer, narrow, one, (2, 16), None, True) for one in (None, whitening))
    for one, other in zip(plain, weighted, strict=True):
        assert cost(other) < cost(one) < cost(narrow[0])


@pytest.mark.parametrize("module", [lambda: nn.Linear(1, 3), lambda: nn.Linear(1, 1), lambda: nn.Embedding(9, 1)])
def test_a_layer_too_small_for_factors(module):
    (layer,) = find_layers(nn.ModuleDict({"layer": module()}))
    assert sums(layer) == []
    assert all(one.cost_bytes < layer.weight.nbytes for one in factored(layer, (1,)))


def test_kinds():
    layer = layer_of("linear")
    assert Candidate(None, 1).kind == "kept" and grids(layer, (3,))[0].kind == "grid"
    assert torch.equal(Candidate(None, 1).error(layer.matrix), torch.zeros(23, 29))


def error_by_hand(candidate: Candidate, matrix: Tensor) -> Tensor:
    stored = on_grid(candidate.factors.left, candidate.low_rank.left) @ on_grid(
        candidate.factors.right, candidate.low_rank.right
    )
    if candidate.grid is not None:
        stored = stored + on_grid(matrix, candidate.grid)
    return stored - matrix.detach()


def test_error_by_hand():
    layer = layer_of("embedding")
    for candidate in factored(layer) + sums(layer):
        torch.testing.assert_close(candidate.error(layer.matrix), error_by_hand(candidate, layer.matrix))
