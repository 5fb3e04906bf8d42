"""The frontier's picture shows the record's numbers, and nothing lies over anything."""

import pytest
from drawn_figures import assert_readable
from hand_made_folders import plan_of, record_for
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lossless.reports.pictures.frontier import frontier_figure

PLAN = plan_of()  # 4,300 bytes of 20,000; +0.3125


def line_of(axes: Axes, label: str) -> list[tuple[float, float]]:
    [line] = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def said(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_plans_and_the_chosen_one() -> None:
    record = record_for(PLAN)
    figure = frontier_figure(record)
    axes = figure.axes[0]
    assert line_of(axes, "best of all plans") == [(size / 1000, loss) for size, loss in record.frontier]
    assert line_of(axes, "chosen") == [(4.3, 0.3125)]
    assert line_of(axes, "original") == [(20, 0)]
    assert said(figure) == [
        "best of all plans (7), predicted by curvature",
        f"chosen, {record.ratio:.2f} times smaller: +0.31 predicted",
        "measured on the calibration rows: +0.031 ± 0.03",
        "original",
    ]
    assert axes.get_xlabel() == "all tensors, kB (original: 20)" and axes.get_ylabel().endswith("nats")
    assert figure.axes[1].get_xlabel() == "times smaller"
    assert_readable(figure)


def test_ratios_stand_above_their_sizes() -> None:
    figure = frontier_figure(record_for(PLAN))
    below, above = figure.axes
    assert below.get_xlim() == above.get_xlim()
    shown = dict(zip((label.get_text() for label in above.get_xticklabels()), above.get_xticks(), strict=True))
    assert shown["4"] == pytest.approx(5) and shown["1"] == pytest.approx(20)


def test_a_bound_is_a_dashed_line() -> None:
    bound = ((1000, 0.5), (2000, 0.03125), (3000, 0.0))
    figure = frontier_figure(record_for(PLAN, bound=bound))
    axes = figure.axes[0]
    assert line_of(axes, "lower bound") == [(size / 1000, loss) for size, loss in bound]
    assert [line.get_linestyle() for line in axes.lines if str(line.get_label()).startswith("lower bound")] == ["--"]
    assert axes.get_xlim()[0] < 1
    assert not any(label.startswith("lower bound") for label in said(frontier_figure(record_for(PLAN))))
    assert_readable(figure)


@pytest.mark.parametrize(
    "settings",
    [
        {"measured_loss_change": None, "measured_loss_change_error": None},
        {"measured_loss_change_error": None},
        {"frontier": ((4300, 0.3125),), "frontier_plans": 1},
        {"original_bytes": 4300},
        {"original_bytes": 9 * 10**9},
        {"frontier": ((0, 1e6), (4300, 0.3125), (20_000, -3.0))},
        {"calibration_loss": 0.0},
        {"theory": "$\\frac$"},
    ],
    ids=["not-finite", "one-batch", "one-plan", "no-smaller", "huge", "extremes", "no-loss", "mathematics"],
)
def test_odd_records_can_be_drawn(settings: dict) -> None:
    figure = frontier_figure(record_for(PLAN, **settings))
    assert_readable(figure)
    measured = [label for label in said(figure) if label.startswith("measured")]
    assert len(measured) == (settings.get("measured_loss_change", 0) is not None)
