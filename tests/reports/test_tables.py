"""Inspection and tables of plans with factors and regimes; how commands print them is in test_cli.py."""

import io
import json

import pytest
from rich.console import Console

from hf_lossless import CompressionPlan, Grid, LayerPlan, LosslessCheckpointConfig
from hf_lossless.reports.tables import inspection, plan_table
from hf_lossless.storage.plan import ActivationGrid, LowRank, Regime

MIXED = LowRank(rank=3, shape=(12, 20), left=Grid(bits=8), right=Grid(bits=4, group_size=8))
FLOATING = LowRank(rank=10, shape=(12, 20))
LAYERS = {
    "kept": LayerPlan(kind="kept", cost_bytes=4000, predicted_loss_change=0.0),
    "grid": LayerPlan(
        kind="grid", grid=Grid(bits=3, group_size=64, rounding="down"), cost_bytes=100, predicted_loss_change=0.5
    ),
    "factors": LayerPlan(kind="low_rank", low_rank=MIXED, cost_bytes=70, predicted_loss_change=-1e-3),
    "wide": LayerPlan(kind="low_rank", low_rank=FLOATING, cost_bytes=640, predicted_loss_change=0.0),
    "both": LayerPlan(
        kind="sum",
        grid=Grid(bits=2),
        low_rank=LowRank(rank=1, shape=(12, 20), left=Grid(bits=8), right=Grid(bits=8)),
        cost_bytes=90,
        predicted_loss_change=0.25,
    ),
}


def plan_of(*names: str, regime: Regime | None = None, theory: str = "llc") -> CompressionPlan:
    layers = {name: LAYERS[name].model_copy(update={"regime": regime}) for name in names}
    return CompressionPlan(theory=theory, layers=layers, other_bytes=7, original_bytes=10_000)


def rows(plan: CompressionPlan) -> list[list[str]]:
    """The table's cells, its headings first."""
    console = Console(width=200, file=io.StringIO())
    console.print(plan_table(plan))
    lines = console.file.getvalue().replace("┃", "│").splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def inspected(plan: CompressionPlan) -> dict:
    values = inspection(LosslessCheckpointConfig.of(plan))
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    return values["layers"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kept", {"bits": 16, "group_size": None, "rank": None, "factor_bits": None, "multiplications": 1}),
        ("grid", {"bits": 3, "group_size": 64, "rank": None, "factor_bits": None, "multiplications": 1}),
        ("factors", {"bits": 8, "rank": 3, "factor_bits": [8, 4], "multiplications": 0.4, "saves_time": True}),
        ("wide", {"bits": 16, "rank": 10, "factor_bits": [16, 16], "multiplications": 4 / 3, "saves_time": False}),
        ("both", {"bits": 2, "rank": 1, "factor_bits": [8, 8], "multiplications": 1 + 2 / 15, "saves_time": False}),
    ],
)
def test_inspection_of_each_kind(name, expected):
    layer = inspected(plan_of(name))[name]
    assert layer["kind"] == LAYERS[name].kind and layer["cost_bytes"] == LAYERS[name].cost_bytes
    assert layer["predicted_loss_change"] == LAYERS[name].predicted_loss_change
    assert layer["regime"] is None
    for key, value in expected.items():
        assert layer[key] == pytest.approx(value) if isinstance(value, float) else layer[key] == value


def test_inspection_of_a_regime():
    regime = Regime(snr=2.0, verdict="measured")
    layer = inspected(plan_of("grid", regime=regime, theory="lod"))["grid"]
    assert layer["regime"] == {
        "verdict": "measured",
        "snr": 2.0,
        "chebyshev": 0.25,
        "central_limit": pytest.approx(0.02275, abs=1e-5),
    }


def test_a_table_without_factors_has_no_columns_for_them():
    assert rows(plan_of("kept", "grid")) == [
        ["layer", "bits", "group", "bytes", "predicted"],
        ["kept", "kept", "", "4,000", "+0.0e+00"],
        ["grid", "3 down", "64", "100", "+5.0e-01"],
        ["everything else", "kept", "", "7", ""],
    ]


def test_a_table_with_factors():
    assert rows(plan_of(*LAYERS)) == [
        ["layer", "bits", "group", "rank", "work", "bytes", "predicted"],
        ["kept", "kept", "", "", "100%", "4,000", "+0.0e+00"],
        ["grid", "3 down", "64", "", "100%", "100", "+5.0e-01"],
        ["factors", "", "", "3 (8, 4)", "40%", "70", "-1.0e-03"],
        ["wide", "", "", "10 (16)", "133%", "640", "+0.0e+00"],
        ["both", "2", "row", "1 (8)", "113%", "90", "+2.5e-01"],
        ["everything else", "kept", "", "", "", "7", ""],
    ]


def test_a_table_with_regimes():
    plan = plan_of("factors", regime=Regime(snr=9.0, verdict="analytic"), theory="lod")
    plan = plan.model_copy(update={"layers": plan.layers | {"kept": LAYERS["kept"]}})
    assert [row[-1] for row in rows(plan)] == ["regime", "analytic", "", ""]
    assert rows(plan)[0] == ["layer", "bits", "group", "rank", "work", "bytes", "predicted", "regime"]


def with_quantised_inputs() -> CompressionPlan:
    grids = {"grid": ActivationGrid(bits=8, range="static"), "factors": ActivationGrid(bits=4, range="dynamic")}
    layers = {name: LAYERS[name].model_copy(update={"activation": grids.get(name)}) for name in ("kept", *grids)}
    return CompressionPlan(
        theory="curvature", layers=layers, other_bytes=7, original_bytes=10_000, activations="quantised"
    )


def test_a_table_with_quantised_inputs():
    plan = with_quantised_inputs()
    assert plan_table(plan).title == "plan (curvature; activations: quantised)"
    table = rows(plan)
    place = table[0].index("input")
    assert [row[place] for row in table] == ["input", "", "8 static", "4 dynamic", ""]


def test_inspection_of_quantised_inputs():
    layers = inspected(with_quantised_inputs())
    assert [layer["activation"] for layer in layers.values()] == [
        None,
        {"bits": 8, "range": "static"},
        {"bits": 4, "range": "dynamic"},
    ]
    assert inspection(LosslessCheckpointConfig.of(with_quantised_inputs()))["activations"] == "quantised"
