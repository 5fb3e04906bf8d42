"""Predicted against measured: every finite measurement is a point, and what is not finite is said."""

import pytest
from drawn_figures import assert_readable
from hand_made_folders import plan_of, record_for
from matplotlib.figure import Figure

from hf_lossless.planning.loss_check import LossCheck
from hf_lossless.reports.pictures.agreement import agreement_figure


def check(checked: str, predicted: float, measured: float | None, error: float | None = 0.01, **more) -> LossCheck:
    return LossCheck(
        checked=checked,
        tensor_bytes=4300,
        predicted_loss_change=predicted,
        measured_loss_change=measured,
        standard_error=error if measured is not None else None,
        **more,
    )


CHECKS = (
    check("plan", 0.25, 2.0),
    check("layer", 0.125, 1.0, layer="grid"),
    check("layer", 0.0625, None, layer="both"),
    check("plan", 0.5, 0.25, None),
    check("model", 0.3125, -0.25),
)


def points(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """The data points by what they are called."""
    return {
        container.get_label(): list(zip(*container.lines[0].get_data(), strict=True))
        for container in figure.axes[0].containers
    }


def test_every_finite_measurement_is_a_point() -> None:
    figure = agreement_figure(record_for(plan_of(), checks=CHECKS, measured_loss_change=-0.25))
    assert points(figure) == {
        "one layer alone": [(0.125, 1.0)],
        "a plan, its weights rounded": [(0.25, 2.0), (0.5, 0.25)],
        "a plan, the finished model": [(0.3125, -0.25)],
    }
    axes = figure.axes[0]
    [ring] = [line for line in axes.lines if line.get_label() == "the chosen plan"]
    assert list(zip(*ring.get_data(), strict=True)) == [(0.3125, -0.25)]
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "not drawn, for the loss was not finite: 1" in said
    assert "128 calibration rows" in axes.get_ylabel() and axes.get_xlabel().startswith("predicted")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert_readable(figure)
    assert left < 0 and right > 0.5 and bottom < -0.27 and top > 2.02


def test_bars_reach_two_standard_errors() -> None:
    figure = agreement_figure(record_for(plan_of(), checks=(check("model", 0.3125, 0.5, 0.125),)))
    [container] = figure.axes[0].containers
    [[low, high]] = container.lines[2][0].get_segments()
    assert (low[1], high[1]) == (0.25, 0.75)


def test_the_line_of_equality_is_one() -> None:
    figure = agreement_figure(record_for(plan_of(), checks=CHECKS))
    [line] = [line for line in figure.axes[0].lines if line.get_label() == "as predicted"]
    across, up = line.get_data()
    assert list(across) == list(up) == sorted(across) and len(across) > 100


@pytest.mark.parametrize(
    "settings",
    [
        {"checks": (check("plan", 0.0, None),), "measured_loss_change": None, "measured_loss_change_error": None},
        {"checks": (check("model", 0.0, 0.0, 0.0),), "chosen": (4300, 0.0), "measured_loss_change": 0.0},
        {"checks": (check("plan", -5.0, 1e12),)},
    ],
    ids=["nothing-finite", "zeros", "far-apart"],
)
def test_odd_records_can_be_drawn(settings: dict) -> None:
    figure = agreement_figure(record_for(plan_of(), **settings))
    assert_readable(figure)
    assert figure.axes[0].get_xlim()[0] < figure.axes[0].get_xlim()[1]
