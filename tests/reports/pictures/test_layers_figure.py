"""The picture of the layers: bars as long as their bits, readable for few layers and for many."""

import pytest
from drawn_figures import assert_readable
from hand_made_folders import LAYERS, many_layers, plan_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lossless.reports.pictures.layers import layers_figure
from hf_lossless.storage.plan import CompressionPlan


def bars(axes: Axes) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_bits_ranks_and_inputs_of_each_kind() -> None:
    figure = layers_figure(plan_of())
    bits, ranks, inputs = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "bits of a weight",
        "rank, % of the full one",
        "bits of an input",
    ]
    assert bars(bits) == [10, 3, 8, 2]  # 10 stands for floating point
    assert [label.get_text() for label in bits.get_xticklabels()][-1] == "float" and bits.get_xticks()[-1] == 10
    assert bars(ranks) == [25, 25] and [text.get_text() for text in ranks.texts] == ["3", "3"]
    points = {str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in inputs.lines}
    assert points == {
        "input, static range": [(8, 1)],
        "input, dynamic range": [(4, 2)],
        "input in floating point": [(10, 0), (10, 3)],
    }
    assert len({patch.get_facecolor() for patch in bits.patches}) == 4  # a colour for each kind
    assert legend(figure) == [
        *("kept in floating point", "codes on a grid", "two factors", "codes plus two factors"),
        *("input, static range", "input, dynamic range", "input in floating point"),
    ]
    assert [label.get_text() for label in bits.get_yticklabels()] == list(LAYERS)
    low, high = bits.get_ylim()
    assert low > high  # the first layer is on top


def test_a_plan_of_grids_has_one_panel() -> None:
    grid = LAYERS["grid"].model_copy(update={"activation": None})
    figure = layers_figure(plan_of({"head": grid}))
    assert [axes.get_xlabel() for axes in figure.axes] == ["bits of a weight"]
    assert legend(figure) == ["codes on a grid"] and figure.axes[0].get_ylabel() == "1 layer"


@pytest.mark.parametrize(("count", "named"), [(12, 12), (64, 64), (300, 60)])
def test_names_do_not_overlap(count: int, named: int) -> None:
    figure = layers_figure(plan_of(many_layers(count)))
    assert_readable(figure)
    bits = figure.axes[0]
    labels = [label for label in bits.get_yticklabels() if label.get_text()]
    assert len(labels) == named and labels[0].get_text() == "0.attention.self.query"  # what all share is left out
    assert bits.get_ylabel() == f"{count} layers" + (", one in 5 named" if count == 300 else "")
    assert figure.bbox.height <= 12 * figure.dpi


@pytest.mark.parametrize("name", ["$\\frac{", "_hidden", "<b>&amp;", "层.0.查询", "a" * 400, "", "tab\tand\nline"])
def test_any_name_can_be_drawn(name: str) -> None:
    figure = layers_figure(plan_of({name: LAYERS["kept"], "other": LAYERS["grid"]}))
    assert_readable(figure)
    assert len(bars(figure.axes[0])) == 2


def test_a_plan_without_layers() -> None:
    figure = layers_figure(CompressionPlan(theory="llc", layers={}, other_bytes=4, original_bytes=4))
    assert_readable(figure)
    assert figure.axes[0].get_ylabel() == "0 layers"
