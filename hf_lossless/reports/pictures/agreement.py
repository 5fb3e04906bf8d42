"""Draws predicted against measured loss changes on the calibration rows."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lossless.checkpoints.record import CompressionRecord
from hf_lossless.planning.loss_check import LossCheck
from hf_lossless.planning.planner import STATED_FACTOR
from hf_lossless.reports.pictures.style import BLUE, GREEN, GREY, VERMILION, loss_axis, new_figure

_CHECKED = {
    "layer": ("^", GREEN, "one layer alone"),
    "plan": ("s", BLUE, "a plan, its weights rounded"),
    "model": ("o", GREY, "a plan, the finished model"),
}


def agreement_figure(record: CompressionRecord) -> Figure:
    """Draws all measured loss changes against their predictions, with two standard errors to each side.

    On the dark line the two are equal; in the shaded part the measured change is at most twice the prediction plus a
    negligible amount. The measurements are on the calibration rows, and may not hold on others. The chosen plan has a
    ring.

    Args:
        record: A record with at least one check; checks without a finite loss are counted in the legend.

    Example:
        >>> check = LossCheck(
        ...     checked="model", tensor_bytes=400, predicted_loss_change=0.25, measured_loss_change=0.125,
        ...     standard_error=None,
        ... )
        >>> record = CompressionRecord(
        ...     theory="curvature", original_bytes=1600, size_bytes=500, chosen=(400, 0.25), measured_loss_change=0.125,
        ...     measured_loss_change_error=None, frontier=((400, 0.25),), frontier_plans=1, resolution_bytes=0,
        ...     checks=(check,), calibration_rows=8, calibration_loss=0.5, versions={},
        ... )
        >>> agreement_figure(record).axes[0].get_xlabel()
        'predicted change of the mean loss, nats'
    """
    figure = new_figure(7, 5)
    axes = figure.add_subplot()
    finite = [check for check in record.checks if check.measured_loss_change is not None]
    for checked, (marker, colour, label) in _CHECKED.items():
        chosen = [check for check in finite if check.checked == checked]
        if chosen:
            axes.errorbar(
                [check.predicted_loss_change for check in chosen],
                [_measured(check) for check in chosen],
                yerr=[2 * (check.standard_error or 0.0) for check in chosen],
                fmt=marker,
                color=colour,
                markeredgecolor="black",
                ecolor=colour,
                elinewidth=1,
                capsize=2,
                label=label,
                zorder=3,
            )
    if record.measured_loss_change is not None:
        axes.plot(
            record.chosen[1],
            record.measured_loss_change,
            "o",
            markersize=15,
            fillstyle="none",
            color=VERMILION,
            markeredgewidth=2,
            label="the chosen plan",
            zorder=4,
        )
    if len(finite) < len(record.checks):
        axes.plot([], [], " ", label=f"not drawn, for the loss was not finite: {len(record.checks) - len(finite)}")
    predicted = [check.predicted_loss_change for check in record.checks] + [record.chosen[1]]
    reach = [_measured(check) + side * 2 * (check.standard_error or 0.0) for check in finite for side in (-1, 1)]
    loss_axis(axes.xaxis, record.negligible, predicted)
    loss_axis(axes.yaxis, record.negligible, [*reach, record.measured_loss_change or 0.0])
    _draw_statement(axes, record.negligible)
    axes.set_xlabel("predicted change of the mean loss, nats")
    axes.set_ylabel(f"measured on the {record.calibration_rows:,} calibration rows, nats")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_statement(axes: Axes, negligible: float) -> None:
    """Draws the line of equality, and the area where the change is at most the stated one."""
    low, high = axes.get_xlim()
    bottom, _ = axes.get_ylim()
    line = _points(low, high)
    axes.plot(line, line, color="black", linewidth=1, label="as predicted")
    stated = [STATED_FACTOR * max(predicted, 0.0) + negligible for predicted in line]
    axes.fill_between(line, [bottom] * len(line), stated, color=BLUE, alpha=0.08, label="at most twice the prediction")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.axvline(0, color="black", linewidth=0.5)


def _points(low: float, high: float) -> list[float]:
    """Makes enough numbers for a smooth line on an axis that is logarithmic at both ends."""
    sizes = [max(-low, high) * 10 ** (-power / 20) for power in range(120)]
    return [
        low,
        *(-size for size in sizes if -size > low),
        0.0,
        *(size for size in reversed(sizes) if size < high),
        high,
    ]


def _measured(check: LossCheck) -> float:
    assert check.measured_loss_change is not None
    return check.measured_loss_change
