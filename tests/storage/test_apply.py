"""Plans are carried out whole or not at all."""

import dataclasses

import pytest
import torch
from rounded_plans import apply_rounded
from tiny_plans import by_hand, dense_matrix, fitting_grid, truncated_svd
from torch import nn

from hf_lossless import PlanError, apply_plan
from hf_lossless.candidates.low_rank import Factors
from hf_lossless.candidates.uniform import quantise
from hf_lossless.storage.activation_grid import StaticGrid
from hf_lossless.storage.grid import QuantisedMatrix, dequantise
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.low_rank import LowRankConv2d, LowRankEmbedding, LowRankLinear
from hf_lossless.storage.modules.packed import PackedConv2d, PackedLinear
from hf_lossless.storage.plan import ActivationGrid, Grid, LayerPlan, LowRank


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(30, 12),
            "linear": nn.Linear(12, 16),
            "conv": nn.Conv2d(4, 8, 3),
            "depthwise": nn.Conv2d(4, 8, 3, groups=4),
            "head": nn.Linear(16, 8),
            "kept": nn.Linear(8, 8),
        }
    )


CHOICES = {
    "embedding": {"kind": "sum", "left": 4, "right": 4},
    "linear": {"kind": "low_rank"},
    "conv": {"kind": "low_rank", "left": 8},
    "depthwise": {"kind": "grid"},
    "head": {"kind": "grid"},
    "kept": {"kind": "kept"},
}


def plans_and_factors(model: nn.Module) -> tuple[dict[str, LayerPlan], dict[str, Factors]]:
    made = {layer.name: by_hand(layer, **CHOICES[layer.name]) for layer in find_layers(model)}
    plans = {name: plan for name, (plan, _) in made.items()}
    return plans, {name: factors for name, (_, factors) in made.items() if factors is not None}


def test_each_kind_of_plan():
    model = build()
    plans, factors = plans_and_factors(model)
    wanted = {
        layer.name: dense_matrix(layer, plans[layer.name], factors.get(layer.name)) for layer in find_layers(model)
    }
    kept, biases = model["kept"], {name: getattr(module, "bias", None) for name, module in model.items()}
    assert apply_rounded(model, plans, factors) is model
    assert {name: type(module) for name, module in model.items()} == {
        "embedding": LowRankEmbedding,
        "linear": LowRankLinear,
        "conv": LowRankConv2d,
        "depthwise": PackedConv2d,
        "head": PackedLinear,
        "kept": nn.Linear,
    }
    assert model["kept"] is kept
    for name, module in model.items():
        assert getattr(module, "bias", None) is biases[name]
        if name != "kept":
            torch.testing.assert_close(module.matrix(), wanted[name], rtol=1e-5, atol=1e-6)
            assert module.weight_bytes == plans[name].cost_bytes


def test_meta_then_load_is_the_same_model():
    model = build()
    plans, factors = plans_and_factors(model)
    apply_rounded(model, plans, factors)
    with torch.device("meta"):
        empty = build()
    apply_plan(empty, plans)
    state = model.state_dict()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in empty.state_dict().items()} == {
        name: (tensor.dtype, tensor.shape)
        for name, tensor in state.items()
        if tensor.numel()  # no guards on meta
    }
    empty.load_state_dict(state, assign=True)
    inputs = {"embedding": torch.arange(6), "linear": torch.randn(2, 12), "conv": torch.randn(2, 4, 5, 5)}
    for name, x in inputs.items():
        assert torch.equal(empty[name](x), model[name](x))


def low_rank_plan(rank: int, shape: tuple[int, int], **settings) -> LayerPlan:
    kind = "sum" if "grid" in settings else "low_rank"
    grids = {side: settings.pop(side) for side in ("left", "right") if side in settings}
    return LayerPlan(
        kind=kind,
        low_rank=LowRank(rank=rank, shape=shape, **grids),
        cost_bytes=1,
        predicted_loss_change=0.0,
        **settings,
    )


GIVEN = object()  # the factors of the planned rank


@pytest.mark.parametrize(
    ("name", "plan", "factors", "message"),
    [
        (
            "linear",
            low_rank_plan(2, (12, 16)),
            GIVEN,
            r"'linear' as a matrix \[12, 16\], but its weight is a matrix \[16, 12\].* Make one for this",
        ),
        (
            "linear",
            low_rank_plan(7, (16, 12)),
            GIVEN,
            r"'linear' \[16, 12\] the rank 7, which saves nothing: .* Plan a rank below 6\.857, or a grid",
        ),
        (
            "conv",
            low_rank_plan(8, (8, 36)),
            GIVEN,
            r"'conv' \[8, 36\] the rank 8, which saves nothing: .* Plan a rank below 6\.545",
        ),
        (
            "depthwise",
            low_rank_plan(2, (8, 9)),
            GIVEN,
            r"'depthwise', a convolution in 4 groups: .* Plan a grid for it",
        ),
        (
            "depthwise",
            low_rank_plan(2, (8, 9), grid=Grid(bits=4)),
            GIVEN,
            r"'depthwise', a convolution in 4 groups",
        ),
        (
            "linear",
            low_rank_plan(2, (16, 12)),
            None,
            r"'linear', but its factors were not given\. Give them: .*factors=Factors\(left, right\)\)",
        ),
        (
            "linear",
            low_rank_plan(2, (16, 12)),
            Factors(torch.ones(16, 3), torch.ones(3, 12)),
            r"left factors of layer 'linear' are a matrix \[16, 3\] on no grid, the plan needs \[16, 2\] on no grid",
        ),
        (
            "linear",
            low_rank_plan(2, (16, 12)),
            Factors(torch.ones(2, 16), torch.ones(2, 12)),
            r"left factors of layer 'linear' are a matrix \[2, 16\] on no grid, the plan needs \[16, 2\]",
        ),
        (
            "linear",
            low_rank_plan(2, (16, 12), left=Grid(bits=4, scale_dtype="float32")),
            GIVEN,
            r"scales of layer 'linear' as float32, its weight needs float16: the plan was made for other weights\.",
        ),
        (
            "linear",
            low_rank_plan(2, (16, 12), grid=Grid(bits=4, scale_dtype="float32")),
            GIVEN,
            r"scales of layer 'linear' as float32, its weight needs float16",
        ),
    ],
    ids=[
        *("shape", "rank", "rank-of-a-convolution", "groups", "groups-of-a-sum", "no-factors"),
        *("factors-of-another-rank", "factors-transposed", "scales-of-a-factor", "scales-of-the-base"),
    ],
)
def test_a_plan_that_does_not_fit(name: str, plan: LayerPlan, factors: Factors | object | None, message: str):
    model = build()
    before = dict(model.items())
    good, good_factors = plans_and_factors(model)
    del good[name]
    good_factors.pop(name, None)
    if factors is GIVEN:
        factors = truncated_svd(model[name].weight.flatten(1), plan.low_rank.rank)
    if factors is not None:
        good_factors[name] = factors
    with pytest.raises(PlanError, match=message):
        apply_rounded(model, {**good, name: plan}, good_factors)
    assert dict(model.items()) == before


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("linear", low_rank_plan(2, (12, 16))),
        ("linear", low_rank_plan(7, (16, 12))),
        ("depthwise", low_rank_plan(2, (8, 9))),
    ],
    ids=["shape", "rank", "groups"],
)
def test_a_plan_that_does_not_fit_a_model_on_meta(name: str, plan: LayerPlan):
    with torch.device("meta"):
        model = build()
    with pytest.raises(PlanError, match=name):
        apply_plan(model, {name: plan})


def test_a_sum_may_have_any_rank():
    model = build()
    matrix = model["linear"].weight
    plan = low_rank_plan(12, (16, 12), grid=fitting_grid(matrix, 2))
    apply_rounded(model, {"linear": plan}, {"linear": truncated_svd(matrix, 12)})
    assert isinstance(model["linear"], LowRankLinear)


ACTIVATIONS = {
    "linear": ActivationGrid(bits=8, range="static"),
    "conv": ActivationGrid(bits=4, range="dynamic"),
    "head": ActivationGrid(bits=8, range="dynamic"),
    "depthwise": ActivationGrid(bits=4, range="static"),
}
STATIC_GRIDS = {
    name: StaticGrid(torch.tensor([0.1]), torch.tensor([zero], dtype=torch.uint8))
    for name, zero in (("linear", 100), ("depthwise", 8))
}


def with_activations(plans: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
    return {name: plan.model_copy(update={"activation": ACTIVATIONS.get(name)}) for name, plan in plans.items()}


def test_quantised_inputs_on_real_weights_and_on_meta():
    model = build()
    plans, factors = plans_and_factors(model)
    plans = with_activations(plans)
    apply_rounded(model, plans, factors, static_grids=STATIC_GRIDS)
    found = {name: module.activation for name, module in model.items() if isinstance(module, CompressedModule)}
    assert {name: None if one is None else one.grid for name, one in found.items()} == {
        name: ACTIVATIONS.get(name) for name in found
    }
    for name, grid in STATIC_GRIDS.items():
        assert torch.equal(model[name].activation.scale, grid.scale)
        assert torch.equal(model[name].activation.zero, grid.zero)
    with torch.device("meta"):
        empty = build()
    apply_plan(empty, plans)
    assert empty["linear"].activation.scale.is_meta
    empty.load_state_dict(model.state_dict(), assign=True)
    inputs = {"linear": torch.randn(2, 12), "conv": torch.randn(2, 4, 5, 5), "depthwise": torch.randn(2, 4, 5, 5)}
    for name, x in inputs.items():
        assert torch.equal(empty[name](x), model[name](x))
        assert not torch.equal(model[name](x + 1e-4), model[name](x)) or ACTIVATIONS[name].range == "static"


def test_a_static_range_that_is_not_given():
    model = build()
    plans, factors = plans_and_factors(model)
    before = dict(model.items())
    message = (
        r"'depthwise' a static range, which was not given\. Give it: .*'depthwise': StoredLayer\(plan, values, Stat"
    )
    with pytest.raises(PlanError, match=message):
        apply_rounded(model, with_activations(plans), factors, static_grids={"linear": STATIC_GRIDS["linear"]})
    assert dict(model.items()) == before


def test_an_embedding_has_no_input_to_quantise():
    model = build()
    plans, factors = plans_and_factors(model)
    plans["embedding"] = plans["embedding"].model_copy(update={"activation": ACTIVATIONS["conv"]})
    before = dict(model.items())
    with pytest.raises(PlanError, match=r"quantises the input of layer 'embedding', which looks up rows or shares"):
        apply_rounded(model, plans, factors)
    assert dict(model.items()) == before


# Codes that need the calibration data.

FEEDBACK = ("head", "depthwise", "embedding")


def feedback_plans(model: nn.Module) -> tuple[dict[str, LayerPlan], dict[str, QuantisedMatrix]]:
    """Plans by feedback, with codes that are not those of rounding to nearest."""
    plans, codes = {}, {}
    for layer in find_layers(model):
        if layer.name in FEEDBACK:
            plan, _ = by_hand(layer, "grid")
            grid = plan.grid.model_copy(update={"rounding": "feedback"})
            plans[layer.name] = plan.model_copy(update={"grid": grid})
            moved = quantise(layer.matrix, grid)
            codes[layer.name] = dataclasses.replace(moved, codes=moved.codes ^ 1)
    return plans, codes


def test_codes_are_stored_as_they_are_given():
    model = build()
    plans, codes = feedback_plans(model)
    apply_rounded(model, plans, rounded=codes)
    for name, one in codes.items():
        expected = dequantise(one.codes, one.scales, one.zeros, one.grid)
        assert torch.equal(model[name].matrix(), expected)
        assert model[name].weight_bytes == plans[name].cost_bytes
    with torch.device("meta"):
        empty = build()
    apply_plan(empty, plans)  # where there are no weights, no codes are needed
    empty.load_state_dict(model.state_dict(), assign=True)
    assert all(torch.equal(empty[name].matrix(), model[name].matrix()) for name in codes)


def other_rows(one: QuantisedMatrix) -> QuantisedMatrix:
    return dataclasses.replace(one, codes=one.codes[:-1], scales=one.scales[:-1])


def other_bits(one: QuantisedMatrix) -> QuantisedMatrix:
    return dataclasses.replace(one, grid=one.grid.model_copy(update={"bits": 4}))


def other_scales(one: QuantisedMatrix) -> QuantisedMatrix:
    return dataclasses.replace(one, grid=one.grid.model_copy(update={"scale_dtype": "float32"}))


def other_rounding(one: QuantisedMatrix) -> QuantisedMatrix:
    return dataclasses.replace(one, grid=one.grid.model_copy(update={"rounding": "nearest"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            None,
            r"stores layer 'head' as codes on a grid, but its values were not given\. Give them: "
            r"apply\(model, \{'head': StoredLayer\(plan, QuantisedMatrix\(\.\.\.\)\)\}\)",
        ),
        (
            other_rows,
            r"codes of layer 'head' are a matrix \[7, 16\] on .*, the plan needs \[8, 16\] on .*\. Round them",
        ),
        (other_bits, r"codes of layer 'head' are a matrix \[8, 16\] on bits=4 .*, the plan needs .* on bits=3 "),
        (
            other_scales,
            r"'head' .*scale_dtype='float32', the plan needs .*scale_dtype='float16'\. Round them for this",
        ),
        (other_rounding, r"'head' .*rounding='nearest' .*, the plan needs .*rounding='feedback'"),
    ],
    ids=["missing", "shape", "bits", "scales", "rounding"],
)
def test_codes_that_do_not_fit(change, message):
    model = build()
    before, state = dict(model.items()), {name: value.clone() for name, value in model.state_dict().items()}
    plans, codes = feedback_plans(model)
    head = codes.pop("head")
    if change is not None:
        codes["head"] = change(head)
    with pytest.raises(PlanError, match=message):
        apply_rounded(model, plans, rounded=codes)
    assert dict(model.items()) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
