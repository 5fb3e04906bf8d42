"""Where the parts of a figure lie once it is drawn."""

from collections.abc import Iterable
from itertools import pairwise

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def draw(figure: Figure) -> None:
    """Lays a figure out and draws it, in memory."""
    FigureCanvasAgg(figure).draw()


def boxes(labels: Iterable[Text]) -> list[Bbox]:
    """The places of the labels that say something, in pixels, from left to right or from the bottom to the top."""
    found = [label.get_window_extent() for label in labels if label.get_text()]
    return sorted(found, key=lambda box: (box.x0 + box.x1, box.y0 + box.y1))


def assert_readable(figure: Figure) -> None:
    """Neighbouring labels of an axis do not overlap, and none leaves the picture."""
    draw(figure)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            places = boxes(label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible())
            assert not [1 for one, other in pairwise(places) if one.overlaps(other.padded(-0.5))]
            assert all(figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1 for box in places)
