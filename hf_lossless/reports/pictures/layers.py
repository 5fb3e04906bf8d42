"""Draws how each layer is stored: bits and rank, in the model's own order."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_lossless.reports.pictures.style import GREY, PURPLE, VERMILION, new_figure, short
from hf_lossless.storage.kinds import KINDS
from hf_lossless.storage.plan import KEPT_BITS, CompressionPlan, LayerPlan

_RANGES = {"static": ("s", VERMILION), "dynamic": ("o", PURPLE)}
_WIDEST = 8
"""Least upper end of the axis of bits."""

_MOST_BITS = 32
"""Largest upper end of the axis of bits; layers of a few weights may take more, because of their side information."""

_MAX_NAMES, _MAX_RANKS = 64, 45
"""Most names beside the axis; most ranks beside their bars."""


def layers_figure(plan: CompressionPlan) -> Figure:
    """Draws the layers of a plan, one bar each, the first at the top.

    The left panel shows the bits of a stored weight (of the wider factor, where there are only factors). Further panels
    show ranks, as a share of the layer's largest possible rank, and the bits of quantised inputs, where there are any.

    Example:
        >>> from hf_lossless.storage.plan import Grid, LayerPlan
        >>> layer = LayerPlan(kind="grid", grid=Grid(bits=3), cost_bytes=9, predicted_loss_change=0.0)
        >>> plan = CompressionPlan(theory="llc", layers={"head": layer}, other_bytes=0, original_bytes=64)
        >>> [axes.get_xlabel() for axes in layers_figure(plan).axes]
        ['bits of a weight']
    """
    layers = list(plan.layers.values())
    panels = [_draw_bits]
    if any(layer.low_rank is not None for layer in layers):
        panels.append(_draw_ranks)
    if plan.activations == "quantised":
        panels.append(_draw_inputs)
    figure = new_figure(6 + len(panels), min(12.0, 1.6 + 0.17 * max(4, len(layers))))
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, draw in zip(columns, panels, strict=True):
        draw(axes, layers)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    _name_rows(columns[0], list(plan.layers))
    present = [kind for name, kind in KINDS.items() if any(layer.kind == name for layer in layers)]
    handles: list[object] = [Patch(color=kind.colour, label=kind.words) for kind in present]
    handles += [handle for axes in columns[1:] for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Writes the layers' names beside their bars, all or every second, third, ...; the first is on top."""
    step = -(-len(names) // _MAX_NAMES) or 1
    shared = _shared_prefix(names)
    shown = range(0, len(names), step)
    axes.set_yticks(shown, [short(names[row][shared:]) for row in shown], fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    of = "layer" if len(names) == 1 else "layers"
    axes.set_ylabel(f"{len(names):,} {of}" + ("" if step == 1 else f", one in {step} named"))


def _shared_prefix(names: Sequence[str]) -> int:
    """Returns the length of the leading name parts that all names share, without their last part."""
    parts = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(len(one) > depth and one[depth] == parts[0][depth] for one in parts) and parts:
        depth += 1
    return sum(len(part) + 1 for part in parts[0][:depth]) if parts else 0


def _draw_bits(axes: Axes, layers: Sequence[LayerPlan]) -> None:
    """Draws bars of the weights' bits; floating point lies beyond the axis, and values above it are written out."""
    bits = [layer.bits for layer in layers if layer.bits != KEPT_BITS]
    widest = min(max([_WIDEST, *map(math.ceil, bits)]), _MOST_BITS)
    axes.barh(
        range(len(layers)),
        [_floating(widest) if layer.bits == KEPT_BITS else min(layer.bits, widest) for layer in layers],
        height=0.8,
        color=[KINDS[layer.kind].colour for layer in layers],
    )
    for row, layer in enumerate(layers):
        if layer.bits != KEPT_BITS and layer.bits > widest:
            axes.annotate(f"{layer.bits:.0f}", (widest, row), xytext=(2, 0), textcoords="offset points", va="center")
    _bits_axis(axes, widest)
    axes.set_xlabel("bits of a weight")


def _floating(widest: int) -> float:
    """Returns the place of floating point on an axis of `widest` bits."""
    return 1.25 * widest


def _bits_axis(axes: Axes, widest: int) -> None:
    """Sets up an axis of bits, with a place for floating point beyond it."""
    ticks = list(range(0, widest + 1, 2 * math.ceil(widest / 8)))
    axes.set_xlim(0, 1.05 * _floating(widest))
    axes.set_xticks([*ticks, _floating(widest)], [*map(str, ticks), "float"])


def _draw_ranks(axes: Axes, layers: Sequence[LayerPlan]) -> None:
    rows = [(row, layer.low_rank) for row, layer in enumerate(layers) if layer.low_rank is not None]
    shares = [100 * low_rank.rank / min(low_rank.shape) for _, low_rank in rows]
    colours = [KINDS[layers[row].kind].colour for row, _ in rows]
    bars = axes.barh([row for row, _ in rows], shares, height=0.8, color=colours)
    if len(layers) <= _MAX_RANKS:
        axes.bar_label(bars, [str(low_rank.rank) for _, low_rank in rows], padding=2, fontsize=7.5)
    axes.set_xlim(0, 118)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel("rank, % of the full one")


def _draw_inputs(axes: Axes, layers: Sequence[LayerPlan]) -> None:
    for name, (marker, colour) in _RANGES.items():
        found = [
            (layer.activation.bits, row)
            for row, layer in enumerate(layers)
            if layer.activation is not None and layer.activation.range == name
        ]
        if found:
            axes.plot(*zip(*found, strict=True), marker, color=colour, markersize=4, label=f"input, {name} range")
    floating = [row for row, layer in enumerate(layers) if layer.activation is None]
    if floating:
        axes.plot([_floating(_WIDEST)] * len(floating), floating, "|", color=GREY, label="input in floating point")
    _bits_axis(axes, _WIDEST)
    axes.set_xlabel("bits of an input")
