"""What a person sees of a neighbourhood: tables in the form of LLC's Table 1, and its Fig. 1 and CET's Fig. 2."""

import math
import os
from collections.abc import Callable, Sequence
from statistics import median, median_low

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from hf_lossless.theories.neighbourhood import Neighbourhood, NoiseGap, NoiseResponse

PAPER_MARKS = {"weights": (8e-3, 2e-1), "activations": (1e-3, 8e-2)}
"""Where LLC Fig. 1 ends the first order, and the second."""

_ORDERS: dict[str, Callable[[NoiseGap], float]] = {
    "first order": lambda gap: gap.first_order_gap,
    "first and second": lambda gap: gap.second_order_gap,
}
_UNTIL: dict[str, Callable[[NoiseResponse], float | None]] = {
    "first order": lambda response: response.first_order_until,
    "first and second": lambda response: response.second_order_until,
}
_COLOURS = {"first order": "tab:blue", "first and second": "tab:orange"}
_SMALLEST = 1e-9
"""What a U of less, or 0, is drawn as: a logarithmic axis has no 0."""


def gap_tables(found: Neighbourhood) -> list[Table]:
    """U by noise size, the largest first, for weights and for activations, in nats.

    "change" is the measured |dL|, U1 the gap to the first order alone, U2 to both; each the median over layers, and
    beside U the largest of a layer.
    """
    tables = []
    for kind, responses in _responses(found).items():
        if not responses:
            continue
        table = Table(title=f"noise in {kind}, median of {len(responses)} layers: U1 first order, U2 and second")
        for heading in ("noise", "change", "U1", "largest", "U2", "largest"):
            table.add_column(heading, justify="right")
        for gaps in reversed(_by_size(responses)):
            cells = [f"{gaps[0].size:.0e}", f"{median(abs(gap.measured) for gap in gaps):.1e}"]
            for gap_of in _ORDERS.values():
                values = [gap_of(gap) for gap in gaps]
                cells += [f"{median(values):.1e}", f"{max(values):.1e}"]
            table.add_row(*cells)
        tables.append(table)
    return tables


def layer_table(found: Neighbourhood) -> Table:
    """Up to which noise each order explains every smaller one, layer by layer, beside the rms of what carries it."""
    table = Table(title="largest noise that each order explains; <: not even the smallest")
    table.add_column("layer", overflow="fold")
    for heading in ("noise in", "rms", "first", "and second"):
        table.add_column(heading, justify="left" if heading == "noise in" else "right")
    for layer in found.layers:
        for kind, response in (("weight", layer.weight), ("input", layer.inputs)):
            if response is not None:
                ends = [until(response) for until in _UNTIL.values()]
                smallest = f"< {response.gaps[0].size:.0e}"
                cells = [smallest if end is None else f"{end:.0e}" for end in ends]
                table.add_row(layer.name if kind == "weight" else "", kind, f"{response.rms:.2g}", *cells)
    return table


def plot_neighbourhood(found: Neighbourhood, path: str | os.PathLike[str]) -> None:
    """Draws U as a PNG file: above by noise size, in the form of LLC Fig. 1; below by layer, as CET Fig. 2.

    Above, lines are medians over layers and bands their range; dashed, where the median layer's order ends; dotted,
    where it ends in LLC's Fig. 1. Below, U has both terms, a line for each noise size.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharey=True)
    names = {
        "weights": [layer.name for layer in found.layers],
        "activations": [layer.name for layer in found.layers if layer.inputs is not None],
    }
    for column, (kind, responses) in enumerate(_responses(found).items()):
        above, below = axes[0, column], axes[1, column]
        above.set_title(f"noise in {kind}")
        if responses:
            _plot_by_size(above, kind, responses)
            _plot_by_layer(below, names[kind], responses)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, title="noise", loc="outside right lower", fontsize="small")
    axes[0, 0].set_ylabel("U, nats")
    axes[1, 0].set_ylabel("U with both orders, nats")
    figure.savefig(path, dpi=150)


def _plot_by_size(axes: Axes, kind: str, responses: Sequence[NoiseResponse]) -> None:
    by_size = _by_size(responses)
    sizes = [gaps[0].size for gaps in by_size]
    for order, gap_of in _ORDERS.items():
        values = [[_drawn(gap_of(gap)) for gap in gaps] for gaps in by_size]
        axes.plot(sizes, [median(row) for row in values], "o-", color=_COLOURS[order], label=order)
        axes.fill_between(sizes, list(map(min, values)), list(map(max, values)), color=_COLOURS[order], alpha=0.15)
        end = median_low(_UNTIL[order](response) or 0.0 for response in responses)  # a size that was tried
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
    by_size = _by_size(responses)
    for place, gaps in enumerate(by_size):
        values = [_drawn(gap.second_order_gap) for gap in gaps]
        shade = str(0.85 * (1 - (place + 1) / len(by_size)))  # the stronger the noise, the darker
        axes.plot(range(len(names)), values, ".-", color=shade, label=f"{gaps[0].size:.0e}")
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=60, ha="right", fontsize="x-small")
    axes.grid(alpha=0.3)


def _responses(found: Neighbourhood) -> dict[str, list[NoiseResponse]]:
    return {
        "weights": [layer.weight for layer in found.layers],
        "activations": [layer.inputs for layer in found.layers if layer.inputs is not None],
    }


def _by_size(responses: Sequence[NoiseResponse]) -> list[tuple[NoiseGap, ...]]:
    """For each noise size, ascending, the gap of every layer."""
    return list(zip(*(response.gaps for response in responses), strict=True))


def _drawn(value: float) -> float:
    return max(value, _SMALLEST) if math.isfinite(value) else math.nan


def _short(name: str) -> str:
    """The end of a long name, as much as fits below an axis."""
    return name if len(name) <= 28 else "…" + name[-27:]
