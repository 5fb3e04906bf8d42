"""Everything the knapsack may choose from: widths as before, then factors cut in the way of each theory."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from hf_lossless import LosslessCompressionConfig
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.candidates import propose as proposals
from hf_lossless.candidates.choices import Choices
from hf_lossless.candidates.grids import Candidate, propose_grids
from hf_lossless.candidates.low_rank import Whitening, factorise
from hf_lossless.candidates.propose import propose
from hf_lossless.candidates.ranks import ranks_by_layer
from hf_lossless.candidates.uniform import on_grid
from hf_lossless.data.batches import batch_loss
from hf_lossless.errors import CalibrationError
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.plan import Grid

TRUNCATIONS = pytest.mark.parametrize("truncation", ["plain", "descent", "metric"])
BATCHES = [(torch.randn(9, 24, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.idle = nn.Linear(24, 40), nn.Linear(40, 3), nn.Linear(24, 24)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(inputs)))


def prepared(curvature: bool = True) -> tuple[list[Layer], Calibration]:
    model = Model().eval()
    layers = find_layers(model)
    return layers, calibrate(model, BATCHES, layers, batch_loss, gradients=True, curvature=curvature)


def candidates(truncation: str, asked="auto", bits=(2, 4, 8, 16), gradient=1.0) -> dict[str, list[Candidate]]:
    """All candidates; the first layer's gradient multiplied by `gradient`."""
    layers, calibration = prepared()
    first = calibration.layers["first"]
    calibration.layers["first"] = dataclasses.replace(first, gradient=gradient * first.gradient)
    config = LosslessCompressionConfig(ratio=2, bits=bits, ranks=asked, group_size=16)
    return propose(layers, calibration, config.choices, ranks_by_layer(layers, config.ranks), truncation)


def fed_back(grid: Grid) -> Grid:
    return grid.model_copy(update={"rounding": "feedback"})


@TRUNCATIONS
def test_without_ranks_only_widths(truncation):
    layers, calibration = prepared()
    config = LosslessCompressionConfig(ratio=2, group_size=16)
    found = propose(layers, calibration, config.choices, {}, truncation)
    for layer in layers:
        proposed = propose_grids(layer, calibration.layers[layer.name], config.bits, 16, True)
        expected = [(one.grid, one.cost_bytes) for one in proposed]
        if truncation == "metric":  # each grid again, to be rounded by feedback
            expected += [(fed_back(grid), cost) for grid, cost in expected if grid is not None]
        assert [(one.grid, one.cost_bytes) for one in found[layer.name]] == expected


@TRUNCATIONS
def test_widths_then_ranks_then_sums(truncation):
    found = candidates(truncation)
    assert list(found) == ["first", "last", "idle"]
    assert [one.kind for one in found["idle"]] == ["kept"]  # no data reached it
    for name in ("first", "last"):
        kinds = [one.kind for one in found[name]]
        widths = ["grid"] * 3 + ["kept"] + ["grid"] * (3 if truncation == "metric" else 0)
        order = widths + ["low_rank"] * kinds.count("low_rank") + ["sum"] * kinds.count("sum")
        assert kinds == order and {"low_rank", "sum"} <= set(kinds)
        ranks = [one.low_rank.rank for one in found[name] if one.kind == "low_rank"]
        assert ranks == sorted(ranks)


def products(found: list[Candidate]) -> dict[int, Tensor]:
    """L R by rank."""
    return {one.low_rank.rank: one.factors.left @ one.factors.right for one in found if one.kind == "low_rank"}


def test_plain_is_the_truncated_svd():
    layers, _ = prepared()
    for rank, product in products(candidates("plain")["first"]).items():
        factors = factorise(layers[0].matrix).truncated(rank)
        torch.testing.assert_close(product, factors.left @ factors.right)


def test_the_metric_is_that_of_the_calibration():
    layers, calibration = prepared()
    whitening = Whitening.of(calibration.layers["first"].curvature)
    found = candidates("metric")["first"]
    for rank, product in products(found).items():
        factors = factorise(layers[0].matrix, whitening).truncated(rank)
        torch.testing.assert_close(product, factors.left @ factors.right, rtol=1e-4, atol=1e-5)
    for one in found:
        if one.kind == "sum":
            remainder = layers[0].matrix.detach() - on_grid(layers[0].matrix, one.grid)
            factors = factorise(remainder, whitening).truncated(one.low_rank.rank)
            product = one.factors.left @ one.factors.right
            torch.testing.assert_close(product, factors.left @ factors.right, rtol=1e-4, atol=1e-5)


def test_descent_points_down_the_gradient():
    layers, calibration = prepared()
    largest = {"plain": [], "descent": []}
    for sign in (1, -1):
        gradient = sign * calibration.layers["first"].gradient
        for truncation, changes in largest.items():
            found = products(candidates(truncation, gradient=sign)["first"]).values()
            changes.append(max(((product - layers[0].matrix) * gradient).sum().item() for product in found))
    assert max(largest["descent"]) < 1e-6 < 1e-3 < max(largest["plain"])


def test_descent_adds_the_smallest_rank_within_the_tolerance(monkeypatch):
    monkeypatch.setattr(proposals, "smallest_rank", lambda factorisation, matrix, gradient, largest: 6)
    assert 6 not in products(candidates("plain")["first"])
    assert 6 in products(candidates("descent")["first"])
    assert 6 not in products(candidates("descent", {"first": (3, 7)})["first"])  # only what was asked
    monkeypatch.setattr(proposals, "smallest_rank", lambda factorisation, matrix, gradient, largest: None)
    assert set(products(candidates("descent")["first"])) == set(products(candidates("plain")["first"]))


@TRUNCATIONS
def test_explicit_ranks(truncation):
    found = candidates(truncation, {"first": (3, 6)}, bits=(4, 16))
    assert [one.kind for one in found["last"]] == ["grid", "kept", *["grid"] * (truncation == "metric")]
    assert list(products(found["first"])) == [3, 6]
    widths = [one.low_rank.left and one.low_rank.left.bits for one in found["first"] if one.kind == "low_rank"]
    assert widths == [4, None, 4, None]


@TRUNCATIONS
def test_ranks_for_a_layer_that_no_data_reaches(truncation):
    assert [one.kind for one in candidates(truncation, {"idle": (3,)})["idle"]] == ["kept"]


def test_factors_are_views_of_one_factorisation():
    found = candidates("plain", bits=(16,))["first"]
    assert len({one.factors.left.untyped_storage().data_ptr() for one in found if one.kind == "low_rank"}) == 1


@TRUNCATIONS
def test_no_candidate_holds_a_graph(truncation):
    for group in candidates(truncation).values():
        for one in group:
            if one.factors is not None:
                assert not one.factors.left.requires_grad and not one.factors.right.requires_grad


def test_a_weight_that_is_not_finite():
    layers, calibration = prepared()
    layers[1].weight.data[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="weight of layer 'last' holds NaN"):
        propose(layers, calibration, Choices(), {}, "plain")
