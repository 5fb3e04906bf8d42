"""Draws the frontier: the predicted loss of the best plan of every size, and the chosen plan."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hf_lossless.checkpoints.record import CompressionRecord
from hf_lossless.reports.pictures.style import BLUE, GREEN, ORANGE, VERMILION, byte_unit, loss_axis, new_figure, short


def frontier_figure(record: CompressionRecord) -> Figure:
    """Draws the plans that no other plan beats in both bytes and predicted loss.

    The lower axis shows the bytes of all tensors, the upper one the ratio. The vertical axis shows the change of the
    mean loss: the line and the dot are predictions, the diamond is the finished model's measured change on the
    calibration rows, with two standard errors to each side. A dashed line shows the rate-distortion bound where it is
    known.

    Example:
        >>> point = (400, 0.25)
        >>> record = CompressionRecord(
        ...     theory="curvature", original_bytes=1600, size_bytes=500, chosen=point, measured_loss_change=0.125,
        ...     measured_loss_change_error=None, frontier=(point,), frontier_plans=1, resolution_bytes=0,
        ...     calibration_rows=8, calibration_loss=0.5, versions={},
        ... )
        >>> frontier_figure(record).axes[0].get_xlabel()
        'all tensors, kB (original: 1.6)'
    """
    figure = new_figure(7, 5)
    axes = figure.add_subplot()
    unit, unit_name = byte_unit(record.original_bytes)
    drawn = [*_draw_lines(axes, record, unit), *_draw_chosen(axes, record, unit)]
    axes.plot(record.original_bytes / unit, 0, "s", color="black", markersize=6, label="original", zorder=3)
    axes.axhline(0, color="black", linewidth=0.8)
    sizes = [record.original_bytes, record.chosen[0], *(size for size, _ in (*record.frontier, *(record.bound or ())))]
    _size_axis(axes, record.original_bytes / unit, min(filter(None, sizes)) / unit, max(sizes) / unit)
    axes.set_xlabel(f"all tensors, {unit_name} (original: {record.original_bytes / unit:.4g})")
    axes.set_ylabel("change of the mean loss, nats")
    loss_axis(axes.yaxis, record.negligible, drawn)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: labels[place] == "original")  # the last of them
    figure.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="outside lower center",
        ncols=2,
        fontsize="small",
    )
    return figure


def _draw_lines(axes: Axes, record: CompressionRecord, unit: int) -> list[float]:
    """Draws the frontier and the bound, and returns their loss changes."""
    sizes, losses = zip(*record.frontier, strict=True)
    # Between the sizes of two plans the cheaper one is the best that fits.
    label = f"best of all plans ({record.frontier_plans:,}), predicted by {short(record.theory, 12)}"
    axes.step([size / unit for size in sizes], losses, where="post", color=BLUE, linewidth=2, label=label)
    if len(sizes) == 1:
        axes.plot(sizes[0] / unit, losses[0], ".", color=BLUE)
    if not record.bound:
        return list(losses)
    bound_sizes, bound_losses = zip(*record.bound, strict=True)
    axes.plot(
        [size / unit for size in bound_sizes],
        bound_losses,
        "--",
        color=GREEN,
        linewidth=2,
        label="lower bound for any code (rate-distortion)",
    )
    return [*losses, *bound_losses]


def _draw_chosen(axes: Axes, record: CompressionRecord, unit: int) -> list[float]:
    """Draws the chosen plan, predicted and measured, and returns the loss changes drawn."""
    size, predicted = record.chosen
    axes.plot(
        size / unit,
        predicted,
        "o",
        color=VERMILION,
        markersize=9,
        zorder=4,
        label=f"chosen, {record.ratio:.2f} times smaller: {predicted:+.2g} predicted",
    )
    measured, error = record.measured_loss_change, record.measured_loss_change_error
    if measured is None:
        return [predicted]
    reach = 0.0 if error is None else 2 * error
    axes.errorbar(
        size / unit,
        measured,
        yerr=None if error is None else reach,
        fmt="D",
        color=ORANGE,
        markeredgecolor="black",
        ecolor="black",
        capsize=4,
        markersize=7,
        zorder=5,
        label=f"measured on the calibration rows: {measured:+.2g}" + ("" if error is None else f" ± {reach:.1g}"),
    )
    return [predicted, measured - reach, measured + reach]


def _size_axis(axes: Axes, original: float, smallest: float, largest: float) -> None:
    """Sets up a logarithmic axis of sizes, with the ratios above it."""
    ends = smallest / 1.1, largest * 1.1
    above = axes.twiny()
    sizes = _round_numbers(*ends)
    ratios = _round_numbers(original / ends[1], original / ends[0])
    for one, places, labels in ((axes, sizes, sizes), (above, [original / ratio for ratio in ratios], ratios)):
        one.set_xscale("log")
        one.set_xlim(*ends)
        one.set_xticks(places, [f"{label:g}" for label in labels])
        one.xaxis.set_minor_locator(NullLocator())
    above.set_xlabel("times smaller")


def _round_numbers(low: float, high: float) -> list[float]:
    """Lists round numbers from low to high, about evenly spaced on a logarithmic axis, as many as fit."""
    decades = math.log10(high / low)
    factors = (1, 1.5, 2, 3, 4, 6, 8) if decades < 1.6 else (1, 2, 5) if decades < 4 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)), 1 + int(decades // 12))
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
