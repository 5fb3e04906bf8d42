"""Draws how far first and second order explain the loss under noise, as LLC's Fig. 1 and CET's Fig. 2."""

import math
from collections.abc import Callable, Sequence
from statistics import median, median_low

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lossless.reports.pictures.style import BLUE, ORANGE, new_figure, short
from hf_lossless.theories.neighbourhood import Neighbourhood, NoiseGap, NoiseResponse

PAPER_MARKS = {"weights": (8e-3, 2e-1), "activations": (1e-3, 8e-2)}
"""The noise sizes where the first and the second order end in LLC Fig. 1."""

ORDERS: dict[str, Callable[[NoiseGap], float]] = {
    "first order": lambda gap: gap.first_order_gap,
    "first and second": lambda gap: gap.second_order_gap,
}
UNTIL: dict[str, Callable[[NoiseResponse], float | None]] = {
    "first order": lambda response: response.first_order_until,
    "first and second": lambda response: response.second_order_until,
}
_COLOURS = {"first order": BLUE, "first and second": ORANGE}
_SMALLEST = 1e-9
"""Smallest U drawn, since a logarithmic axis has no 0."""


def neighbourhood_figure(found: Neighbourhood) -> Figure:
    """Draws U by noise size in the upper row, as in LLC Fig. 1, and by layer in the lower one, as in CET Fig. 2.

    In the upper row lines are medians over layers and bands their range; dashed lines mark where the median layer's
    order ends, dotted lines where it ends in LLC's Fig. 1. In the lower row U has both terms, with one line for each
    noise size.
    """
    figure = new_figure(11, 8)
    axes = figure.subplots(2, 2, sharey=True)
    names = {
        "weights": [layer.name for layer in found.layers],
        "activations": [layer.name for layer in found.layers if layer.inputs is not None],
    }
    for column, (kind, responses) in enumerate(responses_by_kind(found).items()):
        above, below = axes[0, column], axes[1, column]
        above.set_title(f"noise in {kind}")
        if responses:
            _plot_by_size(above, kind, responses)
            _plot_by_layer(below, names[kind], responses)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, title="noise", loc="outside right lower", fontsize="small")
    axes[0, 0].set_ylabel("U, nats")
    axes[1, 0].set_ylabel("U with both orders, nats")
    return figure


def _plot_by_size(axes: Axes, kind: str, responses: Sequence[NoiseResponse]) -> None:
    by_size = gaps_by_size(responses)
    sizes = [gaps[0].size for gaps in by_size]
    for order, gap_of in ORDERS.items():
        values = [[_drawn(gap_of(gap)) for gap in gaps] for gaps in by_size]
        axes.plot(sizes, [median(row) for row in values], "o-", color=_COLOURS[order], label=order)
        axes.fill_between(sizes, list(map(min, values)), list(map(max, values)), color=_COLOURS[order], alpha=0.15)
        end = median_low(UNTIL[order](response) or 0.0 for response in responses)  # a size that was tried
        if end:
            axes.axvline(end, color=_COLOURS[order], linestyle="--", label=f"{order}: up to {end:.0e}")
    for mark, label in zip(PAPER_MARKS[kind], ("LLC Fig. 1", None), strict=True):
        axes.axvline(mark, color="grey", linestyle=":", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("size of the noise")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _plot_by_layer(axes: Axes, names: Sequence[str], responses: Sequence[NoiseResponse]) -> None:
    by_size = gaps_by_size(responses)
    for place, gaps in enumerate(by_size):
        values = [_drawn(gap.second_order_gap) for gap in gaps]
        shade = str(0.85 * (1 - (place + 1) / len(by_size)))  # the stronger the noise, the darker
        axes.plot(range(len(names)), values, ".-", color=shade, label=f"{gaps[0].size:.0e}")
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), [short(name, 28) for name in names], rotation=60, ha="right", fontsize="x-small")
    axes.grid(alpha=0.3)


def responses_by_kind(found: Neighbourhood) -> dict[str, list[NoiseResponse]]:
    """Groups the layers' responses into those to noise in weights and those to noise in inputs."""
    return {
        "weights": [layer.weight for layer in found.layers],
        "activations": [layer.inputs for layer in found.layers if layer.inputs is not None],
    }


def gaps_by_size(responses: Sequence[NoiseResponse]) -> list[tuple[NoiseGap, ...]]:
    """Lists for each noise size, ascending, the gaps of all layers."""
    return list(zip(*(response.gaps for response in responses), strict=True))


def _drawn(value: float) -> float:
    return max(value, _SMALLEST) if math.isfinite(value) else math.nan
