"""Units, axes of loss changes, and addresses of images."""

import base64
import math

import pytest
from matplotlib.figure import Figure

from hf_lossless.reports.pictures.style import byte_unit, loss_axis, new_figure, short, svg_data_uri


@pytest.mark.parametrize(
    ("number", "unit"), [(0, "bytes"), (999, "bytes"), (1000, "kB"), (2_500_000, "MB"), (7 * 10**9, "GB")]
)
def test_units(number: int, unit: str) -> None:
    assert byte_unit(number)[1] == unit


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0], {"0"}),
        ([0.02, 0.003], {"0", "+0.001", "+0.01"}),
        ([-0.02, 0.5], {"0", "-0.001", "-0.01", "+0.001", "+0.01", "+0.1"}),
        ([1e-5, -2e-5], {"0"}),
        ([5e8], {"0", "+0.001", "+0.1", "+10", "+1000", "+100000", "+1e7"}),
    ],
    ids=["nothing", "rise", "both", "small", "huge"],
)
@pytest.mark.parametrize("axis", ["x", "y"])
def test_an_axis_shows_all_that_is_drawn(values: list[float], ticks: set[str], axis: str) -> None:
    axes = new_figure(4, 3).add_subplot()
    loss_axis(getattr(axes, f"{axis}axis"), 7e-4, values)
    low, high = getattr(axes, f"get_{axis}lim")()
    assert low < min(0.0, *values, 0) and max(*values, 0) < high
    assert {label.get_text() for label in getattr(axes, f"get_{axis}ticklabels")()} == ticks
    assert all(low < tick < high for tick in getattr(axes, f"get_{axis}ticks")())


def test_names() -> None:
    assert short("encoder.layer.0") == "encoder.layer.0"
    assert len(short("x" * 100)) == 44 and short("a" + "b" * 100).startswith("…b")
    assert short("a$b\n\x1b[31m") == r"a\$b??[31m"


def test_the_same_picture_has_the_same_address() -> None:
    def picture() -> Figure:
        figure = new_figure(2, 1)
        figure.add_subplot().plot([0, 1], [math.pi, 0], label="<&>")
        figure.legend()
        return figure

    address = svg_data_uri(picture())
    head, data = address.split(",")
    assert head == "data:image/svg+xml;base64"
    text = base64.b64decode(data).decode()
    assert "<svg" in text and "<text" not in text and "<script" not in text  # text as shapes needs no font
    assert svg_data_uri(picture()) == address
