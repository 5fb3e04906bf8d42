"""The frontier: what every size was predicted to cost, and where the chosen plan lies on it."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from hf_lossless.pictures.style import BLUE, GREEN, ORANGE, VERMILION, byte_unit, loss_axis, new_figure
from hf_lossless.record_of_compression import CompressionRecord

_RATIOS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)


def frontier_figure(record: CompressionRecord) -> Figure:
    """Draws the plans that no other plan beats in both bytes and predicted loss.

    Below, the bytes of all tensors; above, how many times smaller that is. Upwards, the change of the mean loss: the
    line and the dot are predictions, the diamond is what the finished model was measured to do on the calibration rows,
    with two standard errors to each side. Dashed, where it is known, what no way to store the weights could beat.

    Example:
        >>> point = (400, 0.25)
        >>> record = CompressionRecord(
        ...     theory="curvature", original_bytes=1600, size_bytes=500, chosen=point, measured_loss_change=0.125,
        ...     measured_loss_change_error=None, frontier=[point], frontier_plans=1, resolution_bytes=0,
        ...     calibration_rows=8, calibration_loss=0.5, versions={},
        ... )
        >>> frontier_figure(record).axes[0].get_xlabel()
        'all tensors, kB (original: 1.6)'
    """
    figure = new_figure(7, 4.5)
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
    axes.legend([handles[place] for place in order], [labels[place] for place in order], loc="upper right")
    return figure


def _draw_lines(axes: Axes, record: CompressionRecord, unit: int) -> list[float]:
    """The frontier and the bound; the changes that they go through."""
    sizes, losses = zip(*record.frontier, strict=True)
    # Between two plans the cheaper one is the best that fits.
    label = f"best plans, {record.frontier_plans:,}, predicted by {record.theory}".replace("$", r"\$")
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
    """The chosen plan, predicted and measured; the changes that are drawn."""
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
    """A logarithmic axis of sizes, with the ratios above it."""
    axes.set_xscale("log")
    axes.set_xlim(smallest / 1.1, largest * 1.1)
    decades = math.log10(largest / smallest) if largest > smallest else 0
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades > 1.5 else (1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    above = axes.twiny()
    above.set_xscale("log")
    above.set_xlim(axes.get_xlim())
    shown = [ratio for ratio in _RATIOS if smallest / 1.1 <= original / ratio <= largest * 1.1]
    above.set_xticks([original / ratio for ratio in shown], [f"{ratio:g}" for ratio in shown])
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xlabel("times smaller")
