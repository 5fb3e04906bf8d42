"""The common style of all pictures: colours that the colour-blind can distinguish, units, and short names.

Figures are made without pyplot, so that they need no display and leave no global state. Colours are those of M. Okabe &
K. Ito, "Color Universal Design", 2008.
"""

import base64
import io
import math
from collections.abc import Iterable

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8C8C8C"

_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))


def new_figure(width: float, height: float) -> Figure:
    """Makes an empty figure of the given size in inches, with a constrained layout."""
    return Figure(figsize=(width, height), layout="constrained")


def svg_data_uri(figure: Figure) -> str:
    """Encodes a figure as an SVG data URI; equal figures give equal URIs."""
    file = io.StringIO()
    # As shapes, text looks the same without its font.
    with matplotlib.rc_context({"svg.hashsalt": "hf-lossless", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue().encode()).decode()}"


def byte_unit(largest: int) -> tuple[int, str]:
    """Chooses the unit for numbers of bytes up to `largest`: its bytes, and its name.

    Example:
        >>> byte_unit(90_855_944)
        (1000000, 'MB')
    """
    return next((unit for unit in _UNITS if largest >= unit[0]), _UNITS[-1])


def loss_axis(axis: Axis, negligible: float, values: Iterable[float]) -> None:
    """Sets up an axis for changes of the loss, negative ones too: linear around 0, logarithmic beyond.

    Args:
        axis: The x axis or the y axis of a picture.
        negligible: A change that does not matter; the axis is linear up to the power of ten nearest to it.
        values: All values that are drawn.
    """
    threshold = 10.0 ** round(math.log10(negligible))
    low, high = min(0.0, *values), max(0.0, *values)
    ticks = [0.0, *_decades(threshold, high), *(-tick for tick in _decades(threshold, -low))]
    ends = min(1.6 * low, -0.3 * threshold), max(1.6 * high, 1.2 * threshold)
    axes = axis.axes
    if axis is axes.xaxis:
        axes.set_xscale("symlog", linthresh=threshold)
        axes.set_xlim(*ends)
    else:
        axes.set_yscale("symlog", linthresh=threshold)
        axes.set_ylim(*ends)
    axis.set_ticks(ticks, [f"{tick:+g}".replace("e-0", "e-").replace("e+0", "e") if tick else "0" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def _decades(smallest: float, largest: float) -> list[float]:
    """Lists powers of ten from `smallest` to `largest`, at most eight; the first whenever it fits."""
    if largest <= 0 or largest < 0.3 * smallest:
        return []
    count = max(0, math.floor(math.log10(largest / smallest) + 1e-9))
    step = 1 + count // 8
    return [smallest * 10.0**power for power in range(0, count + 1, step)]


def short(name: str, length: int = 44) -> str:
    r"""Shortens a long name to its end, escaped for drawing beside an axis.

    A $ would start mathematics, and the font lacks the letters of many scripts.

    Example:
        >>> short("model.$x"), short("encoder.layer.0.output.dense", 12)
        ('model.\\$x', '…utput.dense')
    """
    name = "".join(character if character.isascii() and character.isprintable() else "?" for character in name)
    return (name if len(name) <= length else "…" + name[1 - length :]).replace("$", r"\$")
