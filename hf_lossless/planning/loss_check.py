"""A predicted loss change compared with its measurement on the calibration rows, which influenced the plan."""

import math
from typing import Annotated, Literal

from pydantic import Field

from hf_lossless.storage.plan import CompressionPlan
from hf_lossless.storage.records import Record

NEGLIGIBLE_SHARE = 1e-3
"""Share of the loss: a rise below it does not trigger a new plan, however small the prediction was."""

Checked = Literal["layer", "plan", "model"]


class LossCheck(Record):
    """The predicted and the measured change of the mean loss.

    Attributes:
        checked: "layer": one layer alone, stored as planned. "plan": all layers stored as planned. "model": the
            finished model, whose biases and batch norms are corrected for the rounded weights.
        layer: Name of the layer measured alone; None for the others.
        tensor_bytes: Bytes of all tensors under the plan.
        predicted_loss_change: Change that the theory predicted for the plan.
        measured_loss_change: Change measured on the calibration rows; None: the loss was not finite.
        standard_error: Standard error of the measured change, as a mean over batches; None where there was only one
            batch, or no finite loss.
    """

    checked: Checked
    layer: str | None = None
    tensor_bytes: Annotated[int, Field(ge=0)]
    predicted_loss_change: Annotated[float, Field(allow_inf_nan=False)]
    measured_loss_change: Annotated[float, Field(allow_inf_nan=False)] | None
    standard_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None


def loss_check(
    plan: CompressionPlan,
    measured: tuple[float, float],
    num_batches: int,
    *,
    checked: Checked = "plan",
    layer: str | None = None,
) -> LossCheck:
    """Makes the check of a plan, or of one layer of it.

    Args:
        plan: The measured plan.
        measured: Measured change of the mean loss, and its standard error.
        num_batches: Number of batches behind the standard error.
        checked: Which part of the plan was measured.
        layer: The layer that was measured alone.

    Example:
        >>> plan = CompressionPlan(theory="llc", layers={}, other_bytes=40, original_bytes=40)
        >>> loss_check(plan, (0.25, 0.125), num_batches=4).measured_loss_change
        0.25
    """
    mean, error = measured
    is_finite = math.isfinite(mean)
    return LossCheck(
        checked=checked,
        layer=layer,
        tensor_bytes=plan.tensor_bytes,
        predicted_loss_change=(plan if layer is None else plan.layers[layer]).predicted_loss_change,
        measured_loss_change=mean if is_finite else None,
        standard_error=error if is_finite and math.isfinite(error) and num_batches > 1 else None,
    )
