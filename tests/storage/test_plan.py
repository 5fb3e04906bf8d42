"""What is written down comes back, and nothing else is read."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hf_lossless.errors import PlanError
from hf_lossless.storage.plan import (
    KEPT_BITS,
    ActivationGrid,
    CodedGrid,
    CompressionPlan,
    Damping,
    Grid,
    LayerPlan,
    LowRank,
    Regime,
    activations_of,
    json_bytes,
    kind_of_parts,
)

GRIDS = st.builds(
    Grid,
    bits=st.integers(1, 8),
    group_size=st.none() | st.integers(1, 10**9),
    symmetric=st.booleans(),
    rounding=st.sampled_from(["nearest", "down", "up"]),
    scale_dtype=st.sampled_from(["float16", "float32"]),
)
COMMON = {
    "cost_bytes": st.integers(0, 2**48),
    "predicted_loss_change": st.floats(allow_nan=False, allow_infinity=False),
    "tied": st.lists(st.text(max_size=8), max_size=3).map(tuple),
}
COMMON["regime"] = st.none() | st.builds(
    Regime, snr=st.floats(0, 1e9), verdict=st.sampled_from(["analytic", "measured"])
)
LOW_RANKS = st.builds(
    LowRank,
    rank=st.integers(1, 9),
    shape=st.tuples(st.integers(9, 10**6), st.integers(9, 10**6)),
    left=st.none() | GRIDS,
    right=st.none() | GRIDS,
)
ACTIVATIONS = st.builds(ActivationGrid, bits=st.integers(2, 8), range=st.sampled_from(["static", "dynamic"]))
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
CODED = st.builds(
    CodedGrid,
    step=POSITIVE,
    damping=st.builds(Damping, rows=POSITIVE, columns=POSITIVE),
    shape=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
)
UNTIED = {**COMMON, "tied": st.just(()), "activation": st.none() | ACTIVATIONS}
LAYERS = st.one_of(
    st.builds(LayerPlan, kind=st.just("kept"), **COMMON),
    st.builds(LayerPlan, kind=st.just("grid"), grid=GRIDS, **UNTIED),
    st.builds(LayerPlan, kind=st.just("low_rank"), low_rank=LOW_RANKS, **COMMON),
    st.builds(LayerPlan, kind=st.just("sum"), grid=GRIDS, low_rank=LOW_RANKS, **COMMON),
    st.builds(LayerPlan, kind=st.just("low_rank"), low_rank=LOW_RANKS, **UNTIED),
    st.builds(LayerPlan, kind=st.just("coded"), coded=CODED, **COMMON),
    st.builds(LayerPlan, kind=st.just("coded"), coded=CODED, **UNTIED),
)
PLANS = st.dictionaries(st.text(max_size=12), LAYERS, max_size=4).flatmap(
    lambda layers: st.builds(
        CompressionPlan,
        theory=st.text(max_size=8),
        layers=st.just(layers),
        other_bytes=st.integers(0, 2**48),
        original_bytes=st.integers(0, 2**48),
        activations=st.just(activations_of(layers)),
        activation_noise=st.booleans(),
    )
)


def stored() -> dict:
    return {
        "theory": "llc",
        "layers": {
            "body.0": {"kind": "grid", "grid": {"bits": 3}, "cost_bytes": 40, "predicted_loss_change": 0.25},
            "head": {"kind": "kept", "cost_bytes": 80, "predicted_loss_change": 0.0, "tied": ["embedding"]},
        },
        "other_bytes": 7,
        "original_bytes": 1000,
        "activations": "float",
    }


def test_what_is_stored_is_read():
    plan = CompressionPlan.from_dict(stored())
    assert plan.layers["body.0"].grid == Grid(bits=3, group_size=None, symmetric=True, rounding="nearest")
    assert [layer.bits for layer in plan.layers.values()] == [3, KEPT_BITS]
    assert plan.layers["head"].tied == ("embedding",)
    assert plan.tensor_bytes == 127 and plan.predicted_loss_change == 0.25
    assert plan.to_dict() == stored()


@given(PLANS)
def test_round_trip(plan):
    text = json.dumps(plan.to_dict(), allow_nan=False)
    assert CompressionPlan.from_dict(json.loads(text)) == plan
    assert list(CompressionPlan.from_dict(json.loads(text)).layers) == list(plan.layers)
    assert CompressionPlan.from_dict(plan.to_dict()) == plan


def test_only_what_is_not_a_default_is_written():
    layer = LayerPlan(kind="grid", grid=Grid(bits=4), cost_bytes=1, predicted_loss_change=0.0)
    plan = CompressionPlan(theory="llc", layers={"a": layer}, other_bytes=0, original_bytes=9)
    written = {"kind": "grid", "grid": {"bits": 4}, "cost_bytes": 1, "predicted_loss_change": 0.0}
    assert plan.to_dict() == {
        "theory": "llc",
        "layers": {"a": written},
        "other_bytes": 0,
        "original_bytes": 9,
        "activations": "float",  # said always: it is a promise about the run time
    }


def changed(path: str, value: object) -> dict:
    """The stored plan with one field set; `...` takes it away."""
    values = copy.deepcopy(stored())
    *parents, field = path.split("/")
    place = values
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[field]
    else:
        place[field] = value
    return values


STORED_CODED = {"step": 0.5, "damping": {"rows": 0.3, "columns": 0.1}, "shape": [8, 12]}
GRID, LAYER = "layers/body.0/grid/", "layers/body.0/"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (GRID + "bits", 0, r"at layers\.body\.0\.grid\.bits: .*greater than or equal to 1 \(got 0\)"),
        (GRID + "bits", 9, r"at layers\.body\.0\.grid\.bits: .*less than or equal to 8 \(got 9\)"),
        (GRID + "bits", 4.0, r"bits: Input should be a valid integer \(got 4\.0\)"),
        (GRID + "bits", "4", r"bits: Input should be a valid integer \(got '4'\)"),
        (GRID + "bits", True, r"bits: Input should be a valid integer \(got True\)"),
        (GRID + "bits", ..., r"grid\.bits: Field required"),
        (GRID + "group_size", 0, r"group_size: .*greater than or equal to 1 \(got 0\)"),
        (GRID + "group_size", "64", r"group_size: .*valid integer \(got '64'\)"),
        (GRID + "symmetric", 1, r"symmetric: .*valid boolean \(got 1\)"),
        (GRID + "rounding", "sideways", r"rounding: .*'nearest', 'down', 'up' or 'feedback' \(got 'sideways'\)"),
        (GRID + "scale_dtype", "bfloat16", r"scale_dtype: .*'float16' or 'float32' \(got 'bfloat16'\)"),
        (GRID + "clip", 1, r"grid\.clip: Extra inputs are not permitted \(got 1\)"),
        (LAYER + "kind", "sparse", r"at layers\.body\.0\.kind: .*'low_rank', 'sum' or 'coded' \(got 'sparse'\)"),
        (LAYER + "kind", "kept", r"kind 'kept' does not go with its parts, which make the kind 'grid'"),
        (LAYER + "kind", "low_rank", r"kind 'low_rank' does not go with its parts"),
        (LAYER + "grid", None, r"kind 'grid' does not go with its parts, which make the kind 'kept'"),
        (LAYER + "low_rank", {"rank": 0, "shape": [8, 8]}, r"low_rank\.rank: .*greater than or equal to 1 \(got 0\)"),
        (LAYER + "low_rank", {"rank": 9, "shape": [8, 12]}, r"rank 9 is above the sides \[8, 12\] of the matrix"),
        (LAYER + "low_rank", {"rank": 2, "shape": [8, 0]}, r"low_rank\.shape\.1: .*greater than or equal to 1"),
        (LAYER + "low_rank", {"rank": 2, "shape": [8, 8]}, r"kind 'grid' does not go with .* the kind 'sum'"),
        (LAYER + "coded", STORED_CODED, r"kind 'grid' does not go with its parts, which go with no kind"),
        (LAYER + "coded", {**STORED_CODED, "step": 0}, r"coded\.step: .*greater than 0 \(got 0\)"),
        (LAYER + "coded", {**STORED_CODED, "step": float("inf")}, r"coded\.step: .*finite number"),
        (LAYER + "coded", {**STORED_CODED, "shape": [8]}, r"coded\.shape\.1: Field required"),
        (LAYER + "coded", {**STORED_CODED, "shape": [0, 8]}, r"coded\.shape\.0: .*greater than or equal to 1"),
        (LAYER + "coded", {**STORED_CODED, "damping": {"rows": 1}}, r"coded\.damping\.columns: Field required"),
        (LAYER + "coded", {**STORED_CODED, "bits": 3}, r"coded\.bits: Extra inputs are not permitted"),
        (LAYER + "regime", {"snr": -1, "verdict": "analytic"}, r"regime\.snr: .*greater than or equal to 0"),
        (LAYER + "regime", {"snr": 1, "verdict": "sure"}, r"regime\.verdict: .*'analytic' or 'measured'"),
        (LAYER + "cost_bytes", -1, r"cost_bytes: .*greater than or equal to 0 \(got -1\)"),
        (LAYER + "cost_bytes", 1.5, r"cost_bytes: .*valid integer \(got 1\.5\)"),
        (LAYER + "predicted_loss_change", "0", r"predicted_loss_change: .*valid number \(got '0'\)"),
        (LAYER + "predicted_loss_change", float("nan"), r"predicted_loss_change: .*finite number \(got nan\)"),
        (LAYER + "predicted_loss_change", float("inf"), r"predicted_loss_change: .*finite number \(got inf\)"),
        (LAYER + "tied", "head", r"tied: .*valid array \(got 'head'\)"),
        (LAYER + "rank", 4, r"layers\.body\.0\.rank: Extra inputs are not permitted \(got 4\)"),
        ("theory", ..., r"at theory: Field required"),
        ("theory", None, r"at theory: .*valid string \(got None\)"),
        ("layers", [], r"at layers: .*\(got \[\]\)"),
        ("other_bytes", -3, r"at other_bytes: .*greater than or equal to 0 \(got -3\)"),
        ("original_bytes", "big", r"at original_bytes: .*valid integer \(got 'big'\)"),
        ("activations", "int8", r"at activations: Input should be 'float' or 'quantised' \(got 'int8'\)"),
        ("activations", "quantised", r"at its top: .*activations 'quantised' does not go with the layers"),
        (LAYER + "activation", {"bits": 8, "range": "static"}, r"activations 'float' does not go with the layers"),
        (LAYER + "activation", {"bits": 1, "range": "static"}, r"activation\.bits: .*or equal to 2 \(got 1\)"),
        (LAYER + "activation", {"bits": 9, "range": "static"}, r"activation\.bits: .*or equal to 8 \(got 9\)"),
        (LAYER + "activation", {"bits": 8}, r"activation\.range: Field required"),
        (
            LAYER + "activation",
            {"bits": 8, "range": "row"},
            r"activation\.range: .*'static' or 'dynamic' \(got 'row'\)",
        ),
        (
            "layers/head/activation",
            {"bits": 8, "range": "dynamic"},
            r"kept, or tied to others, stays in floating point",
        ),
        ("activation_noise", "yes", r"at activation_noise: .*valid boolean"),
        ("certificate", {}, r"at certificate: Extra inputs are not permitted"),
    ],
)
def test_a_malformed_plan(path, value, message):
    with pytest.raises(
        PlanError, match=f"the compression plan is malformed {message}" if message[:3] == "at " else message
    ):
        CompressionPlan.from_dict(changed(path, value))


@pytest.mark.parametrize("values", [None, [], "plan", 3], ids=str)
def test_no_plan_at_all(values):
    with pytest.raises(PlanError, match=r"malformed at its top: .*Take config\.json again from where"):
        CompressionPlan.from_dict(values)


@pytest.mark.parametrize("values", [{1, 2}, {"layers": object()}, b"plan"], ids=["set", "object", "bytes"])
def test_what_json_cannot_hold(values):
    with pytest.raises(PlanError, match=r"not made of JSON values: .*not JSON serializable"):
        CompressionPlan.from_dict(values)


def test_a_message_is_short_whatever_the_plan():
    values = changed("theory", ...)
    values["layers"] = {f"layer.{i}": stored()["layers"]["head"] for i in range(1000)}
    with pytest.raises(PlanError, match="Field required") as caught:
        CompressionPlan.from_dict(values)
    assert len(str(caught.value)) < 1000


def test_factors_are_read():
    values = changed(LAYER + "low_rank", {"rank": 2, "shape": [8, 12], "right": {"bits": 4}})
    values["layers"]["body.0"] |= {"kind": "sum", "regime": {"snr": 3.5, "verdict": "measured"}}
    layer = CompressionPlan.from_dict(values).layers["body.0"]
    assert layer.low_rank == LowRank(rank=2, shape=(8, 12), right=Grid(bits=4)) and layer.low_rank.left is None
    assert layer.regime == Regime(snr=3.5, verdict="measured")
    assert CompressionPlan.from_dict(values).to_dict() == values  # defaults are not written


SMALL = LowRank(rank=2, shape=(8, 12))
SHAPED = CodedGrid(step=0.5, damping=Damping(rows=0.3, columns=0.1), shape=(8, 12))


@pytest.mark.parametrize(
    ("grid", "low_rank", "coded", "kind"),
    [
        (None, None, None, "kept"),
        (Grid(bits=3), None, None, "grid"),
        (None, SMALL, None, "low_rank"),
        (Grid(bits=3), SMALL, None, "sum"),
        (None, None, SHAPED, "coded"),
        (Grid(bits=3), None, SHAPED, None),
        (None, SMALL, SHAPED, None),
        (Grid(bits=3), SMALL, SHAPED, None),
    ],
)
def test_kinds_and_their_parts(grid, low_rank, coded, kind):
    assert kind_of_parts(grid, low_rank, coded) == kind
    what = "go with no kind" if kind is None else f"make the kind '{kind}'"
    for other in ("kept", "grid", "low_rank", "sum", "coded"):
        fields = {
            "grid": grid,
            "low_rank": low_rank,
            "coded": coded,
            "cost_bytes": 1,
            "predicted_loss_change": 0.0,
        }
        if other == kind:
            assert LayerPlan(kind=other, **fields).kind == kind
        else:
            with pytest.raises(ValidationError, match=f"kind '{other}' does not go with its parts, which {what}"):
                LayerPlan(kind=other, **fields)


def test_bits_of_a_coded_layer_are_those_it_takes():
    layer = LayerPlan(kind="coded", coded=SHAPED, cost_bytes=30, predicted_loss_change=0.0)
    assert layer.bits == 8 * 30 / (8 * 12) and layer.multiplications_share == 1.0


def test_coded_layers_are_read():
    values = changed(LAYER + "kind", "coded")
    del values["layers"]["body.0"]["grid"]
    values["layers"]["body.0"]["coded"] = STORED_CODED
    plan = CompressionPlan.from_dict(values)
    assert plan.layers["body.0"].coded == SHAPED
    assert plan.to_dict() == values


@pytest.mark.parametrize(
    ("left", "right", "grid", "bits"),
    [
        (None, None, None, 16),
        (4, 8, None, 8),
        (8, 4, None, 8),
        (None, 4, None, 16),
        (4, 4, None, 4),
        (8, 8, 3, 3),
        (None, None, 2, 2),
    ],
)
def test_bits_of_factors(left, right, grid, bits):
    grids = [None if width is None else Grid(bits=width) for width in (left, right, grid)]
    low_rank = LowRank(rank=2, shape=(8, 12), left=grids[0], right=grids[1])
    kind = kind_of_parts(grids[2], low_rank, None)
    layer = LayerPlan(kind=kind, grid=grids[2], low_rank=low_rank, cost_bytes=1, predicted_loss_change=0.0)
    assert layer.bits == bits


def test_multiplications():
    """L (R x) does rank (out + in) multiplications, W x does out in."""
    fields = {"low_rank": SMALL, "cost_bytes": 1, "predicted_loss_change": 0.0}
    assert LayerPlan(kind="low_rank", **fields).multiplications_share == 2 * (8 + 12) / (8 * 12)
    assert LayerPlan(kind="sum", grid=Grid(bits=3), **fields).multiplications_share == 1 + 2 * (8 + 12) / (8 * 12)
    del fields["low_rank"]
    assert LayerPlan(kind="kept", **fields).multiplications_share == 1
    assert LayerPlan(kind="grid", grid=Grid(bits=3), **fields).multiplications_share == 1


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_less_time_is_fewer_numbers(out_features, in_features, rank):
    if rank > min(out_features, in_features):
        with pytest.raises(ValidationError, match=f"rank {rank} is above the sides"):
            LowRank(rank=rank, shape=(out_features, in_features))
        return
    low_rank = LowRank(rank=rank, shape=(out_features, in_features))
    layer = LayerPlan(kind="low_rank", low_rank=low_rank, cost_bytes=1, predicted_loss_change=0.0)
    assert (layer.multiplications_share < 1) == (rank * (out_features + in_features) < out_features * in_features)


def test_bounds_of_a_regime():
    """A.2.2: Chebyshev's 1 / SNR^2 and the normal Phi(-SNR)."""
    certain, unsure = Regime(snr=77.2, verdict="analytic"), Regime(snr=0.5, verdict="measured")
    assert certain.chebyshev == pytest.approx(1.68e-4, rel=0.01) and unsure.chebyshev == 1.0
    assert Regime(snr=0.0, verdict="measured").chebyshev == 1.0
    assert Regime(snr=0.0, verdict="measured").central_limit == 0.5
    assert Regime(snr=1.0, verdict="measured").central_limit == pytest.approx(0.158655, abs=1e-6)
    assert unsure.central_limit == pytest.approx(0.308538, abs=1e-6)
    for snr in (0.1, 1.0, 1.5, 3.0, 40.0):
        regime = Regime(snr=snr, verdict="measured")
        assert regime.central_limit <= regime.chebyshev <= 1


def test_records_are_frozen():
    plan = CompressionPlan.from_dict(stored())
    for record, field in [(plan, "theory"), (plan.layers["head"], "cost_bytes"), (plan.layers["body.0"].grid, "bits")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(record, field, getattr(record, field))


def test_records_convert_nothing():
    with pytest.raises(ValidationError, match="valid integer"):
        Grid(bits="4")
    with pytest.raises(ValidationError, match="Extra inputs"):
        Grid(bits=4, rank=2)
    with pytest.raises(ValidationError, match="does not go with its parts"):
        LayerPlan(kind="grid", cost_bytes=1, predicted_loss_change=0.0)


@pytest.mark.parametrize(
    ("group_size", "in_features", "groups"),
    [(None, 7, 1), (1, 7, 7), (3, 7, 3), (7, 7, 1), (64, 7, 1), (3, 6, 2)],
)
def test_num_groups(group_size, in_features, groups):
    assert Grid(bits=4, group_size=group_size).num_groups(in_features) == groups


@given(PLANS)
def test_json_bytes_are_those_of_the_entry(plan):
    """What config.json grows by, laid out as transformers does."""
    values = plan.to_dict()
    without = json.dumps({"architectures": ["A"]}, indent=2, sort_keys=True)
    entry = json.dumps({"architectures": ["A"], "quantization_config": values}, indent=2, sort_keys=True)
    assert json_bytes(values) == len(entry.encode()) - len(without.encode())


def test_quantised_activations_are_read():
    values = changed(LAYER + "activation", {"bits": 8, "range": "static"}) | {"activations": "quantised"}
    plan = CompressionPlan.from_dict(values)
    assert plan.layers["body.0"].activation == ActivationGrid(bits=8, range="static")
    assert plan.layers["head"].activation is None
    assert plan.to_dict() == values


@pytest.mark.parametrize(("range", "stored_bytes"), [("static", 5), ("dynamic", 0)])
def test_bytes_of_an_activation_grid(range, stored_bytes):
    assert ActivationGrid(bits=4, range=range).stored_bytes == stored_bytes
