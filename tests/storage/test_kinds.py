"""Every kind of storage is known wherever layers are built, named, drawn and described: one walk over all of them."""

import typing

import pytest
from torch import nn

from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.reports.card.text import install_command, storage_table
from hf_lossless.reports.html import _summary
from hf_lossless.reports.pictures.layers import layers_figure
from hf_lossless.reports.tables import plan_table
from hf_lossless.reports.words import limitations
from hf_lossless.storage.kinds import KINDS, extras_of, stored_as
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import (
    CodedGrid,
    CompressionPlan,
    Damping,
    Grid,
    LayerPlan,
    LayerPlanKind,
    LowRank,
    kind_of_parts,
)

SHAPE = (8, 12)
PARTS = {
    "kept": {},
    "grid": {"grid": Grid(bits=3)},
    "low_rank": {"low_rank": LowRank(rank=2, shape=SHAPE)},
    "sum": {"grid": Grid(bits=2), "low_rank": LowRank(rank=2, shape=SHAPE)},
    "coded": {"coded": CodedGrid(step=0.1, damping=Damping(rows=1.0, columns=0.1), shape=SHAPE)},
}
PLANS = {
    kind: LayerPlan(kind=kind, cost_bytes=140, predicted_loss_change=0.0, **parts) for kind, parts in PARTS.items()
}


def plan_of(*kinds: str) -> CompressionPlan:
    layers = {f"layer.{kind}": PLANS[kind] for kind in kinds}
    return CompressionPlan(theory="curvature", layers=layers, other_bytes=4, original_bytes=4000)


def test_there_is_one_of_each() -> None:
    assert tuple(KINDS) == typing.get_args(LayerPlanKind) and KINDS.keys() == PARTS.keys()
    assert len({kind.words for kind in KINDS.values()}) == len({kind.colour for kind in KINDS.values()}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_make_the_kind(kind: LayerPlanKind) -> None:
    parts = {"grid": None, "low_rank": None, "coded": None} | PARTS[kind]
    assert kind_of_parts(**parts) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_its_module_stands_in_for_the_layer(kind: LayerPlanKind) -> None:
    build = KINDS[kind].module
    assert (build is None) == (kind == "kept") == (KINDS[kind].values is None)
    if build is not None:
        layer = Layer("layer", nn.Linear(12, 8, device="meta"), "linear")
        module = build(layer, PLANS[kind])
        assert module.matrix_shape == SHAPE and module.bias is layer.module.bias


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_in_every_report(kind: LayerPlanKind) -> None:
    plan, words = plan_of(kind), KINDS[kind].words
    assert _summary(plan) == [f"1 as {words}, 140 bytes"]
    assert stored_as(PLANS[kind]).startswith(words) and f"| {stored_as(PLANS[kind])} | 1 | 140 |" in storage_table(plan)
    assert [text.get_text() for text in layers_figure(plan).legends[0].get_texts()] == [words]
    assert KINDS[kind].width(PLANS[kind]) == next(iter(plan_table(plan).columns[1].cells))


@pytest.mark.parametrize("kind", KINDS)
def test_extra_and_checksum_are_told(kind: LayerPlanKind) -> None:
    plan, extra = plan_of("grid", kind), KINDS[kind].extra
    assert extras_of(plan) == ([] if extra is None else [extra])
    assert install_command(plan) == (
        "pip install hf-lossless" if extra is None else f"pip install 'hf-lossless[{extra}]'"
    )
    told = " ".join(limitations(LosslessCheckpointConfig.of(plan), None))
    assert ("there is no checksum." in told) != KINDS[kind].checksum
    assert ("1 of 2 layers have a checksum" in told) == KINDS[kind].checksum


@pytest.mark.parametrize(("cost_bytes", "drawn"), [(24, 2.0), (140, 11.67), (900, 32.0)], ids=["few", "many", "most"])
def test_bits_are_drawn_as_they_are(cost_bytes: int, drawn: float) -> None:
    layer = PLANS["coded"].model_copy(update={"cost_bytes": cost_bytes})
    plan = plan_of("kept").model_copy(update={"layers": {"kept": PLANS["kept"], "coded": layer}})
    axes = layers_figure(plan).axes[0]
    kept, coded = (patch.get_width() for patch in axes.patches)
    assert coded == pytest.approx(drawn, abs=0.01) and kept > coded
    assert [text.get_text() for text in axes.texts] == (["75"] if cost_bytes == 900 else [])
