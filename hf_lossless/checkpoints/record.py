"""compression.json: what a compression knew and config.json does not keep, for pictures and reports.

It lies beside config.json in a saved folder. Nothing that loads a model reads it, so it counts in no size.
"""

import math
import re
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, field_validator

from hf_lossless.certification.certificate import library_versions
from hf_lossless.checkpoints.files import read_json, write_file
from hf_lossless.errors import CheckpointError
from hf_lossless.planning.loss_check import NEGLIGIBLE_SHARE, LossCheck
from hf_lossless.storage.plan import CompressionPlan
from hf_lossless.storage.records import Record, read_record

if TYPE_CHECKING:
    from hf_lossless.compression import CompressionResult
    from hf_lossless.planning.knapsack import Frontier

FILE_NAME = "compression.json"

MAX_POINTS = 200
"""Of the frontier; a picture shows no more."""

_Bytes = Annotated[int, Field(ge=0)]
_Number = Annotated[float, Field(allow_inf_nan=False)]

Point = tuple[_Bytes, _Number]
"""Bytes of all tensors, and the change of the mean loss that is predicted for them."""


class CompressionRecord(Record):
    """How a compressed model came about.

    Attributes:
        format_version: Of this record.
        theory: What predicted the loss changes.
        original_bytes: Bytes of all the original's tensors.
        size_bytes: Bytes of the whole checkpoint: its tensors, and its entry in config.json.
        chosen: The plan that was chosen, a point of the frontier.
        measured_loss_change: The finished model's, on the calibration rows; None: it was not finite.
        measured_loss_change_error: Its standard error; None where there was one batch.
        frontier: The plans that no other plan beats, by ascending bytes; thinned, with both ends and the chosen one.
        frontier_plans: How many there were.
        resolution_bytes: To how many bytes the search rounded costs; 0: the frontier is exact.
        bound: What no way to store the weights could beat, by ascending bytes; None where it was not computed.
        checks: Everything that was measured beside its prediction.
        layer_order: The layers' names in the model's own order, which config.json does not keep.
        calibration_rows: Rows that were calibrated on.
        calibration_loss: The original's mean loss on them.
        not_smaller: Why no smaller plan is certified; None without a certificate.
        versions: Of the libraries, by name.
    """

    format_version: Literal[1] = 1
    theory: str
    original_bytes: _Bytes
    size_bytes: Annotated[int, Field(ge=1)]
    chosen: Point
    measured_loss_change: _Number | None
    measured_loss_change_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    frontier: Annotated[tuple[Point, ...], Field(min_length=1)]
    frontier_plans: Annotated[int, Field(ge=1)]
    resolution_bytes: _Bytes
    bound: tuple[Point, ...] | None = None
    checks: tuple[LossCheck, ...] = ()
    layer_order: tuple[str, ...] = ()
    calibration_rows: Annotated[int, Field(ge=1)]
    calibration_loss: _Number
    not_smaller: str | None = None
    versions: dict[str, str] = Field(default_factory=library_versions)

    @field_validator("frontier", "bound")
    @classmethod
    def _bytes_ascend(cls, points: tuple[Point, ...] | None) -> tuple[Point, ...] | None:
        if any(before >= after for (before, _), (after, _) in pairwise(points or ())):
            raise ValueError("bytes do not ascend from point to point")
        return points

    @property
    def ratio(self) -> float:
        """Bytes of the original model's tensors over `size_bytes`."""
        return self.original_bytes / self.size_bytes

    @property
    def negligible(self) -> float:
        """A change of the loss that does not matter: a thousandth of it, as for the planner; above 0."""
        return max(NEGLIGIBLE_SHARE * abs(self.calibration_loss), 1e-9)


def record_of(result: "CompressionResult") -> CompressionRecord:
    """What is worth keeping of a compression.

    Args:
        result: Of `compress`, or of a first load: `model.hf_quantizer.result`.

    Example:
        >>> import torch
        >>> from hf_lossless import LosslessCompressionConfig, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> batch = (torch.randn(8, 16), torch.randint(0, 2, (8,)))
        >>> record = record_of(compress(model, [batch], LosslessCompressionConfig(max_bytes=2000, bits=(4, 8))))
        >>> record.chosen in record.frontier and record.chosen[0] <= 2000
        True
    """
    plan, last = result.plan, result.checks[-1]
    chosen = (plan.tensor_bytes, plan.predicted_loss_change)
    return CompressionRecord(
        theory=plan.theory,
        original_bytes=plan.original_bytes,
        size_bytes=result.size_bytes,
        chosen=chosen,
        measured_loss_change=last.measured_loss_change,
        measured_loss_change_error=last.standard_error,
        frontier=_thinned(result.frontier, plan.other_bytes, chosen),
        frontier_plans=len(result.frontier),
        resolution_bytes=result.frontier.resolution_bytes,
        bound=result.bound,
        checks=result.checks,
        layer_order=tuple(plan.layers),
        calibration_rows=result.calibration.num_examples,
        calibration_loss=result.calibration.loss,
        not_smaller=result.not_smaller,
    )


def write_record(folder: str | PathLike[str], record: CompressionRecord) -> None:
    """Writes a record into a saved folder, whole or not at all; one that is there is replaced."""
    write_file(Path(folder) / FILE_NAME, record.model_dump_json() + "\n")


def read_record_of(folder: str | PathLike[str], plan: CompressionPlan) -> CompressionRecord | None:
    """Reads the record of a saved folder; None where it has none.

    Args:
        folder: The folder.
        plan: The plan in its config.json.

    Raises:
        CheckpointError: The record is malformed or cannot be read, or is of another plan than the one in config.json.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return None
    remedy = f"Delete {path}, which only reports need, or take it again from where it came from."
    record = read_record(CompressionRecord, read_json(path, remedy, remedy), str(path), CheckpointError, remedy)
    ours, theirs = (record.theory, record.chosen[1]), (plan.theory, plan.predicted_loss_change)
    # A sum of the same numbers in another order may differ in its last digits.
    if ours[0] != theirs[0] or not math.isclose(ours[1], theirs[1], rel_tol=1e-6, abs_tol=1e-12):
        raise CheckpointError(
            f"{path} is of another plan ({ours[0]}, predicted change {ours[1]:.4g}) than the one in config.json "
            f"({theirs[0]}, {theirs[1]:.4g}). {remedy}"
        )
    return record


def plan_in_order(plan: CompressionPlan, record: CompressionRecord | None) -> CompressionPlan:
    """A saved plan with its layers in the model's own order, for config.json has them by name, 10 before 2.

    Args:
        plan: Of a saved folder.
        record: Of the same folder; None: layers come by name, with numbers in the order of counting.

    Example:
        >>> from hf_lossless.storage.plan import LayerPlan
        >>> layers = {name: LayerPlan(kind="kept", cost_bytes=4, predicted_loss_change=0.0) for name in ("l.10", "l.9")}
        >>> plan = CompressionPlan(theory="llc", layers=layers, other_bytes=0, original_bytes=8)
        >>> list(plan_in_order(plan, None).layers)
        ['l.9', 'l.10']
    """
    places = {} if record is None else {name: place for place, name in enumerate(record.layer_order)}
    names = sorted(plan.layers, key=lambda name: (places.get(name, len(places)), _by_number(name)))
    return plan.model_copy(update={"layers": {name: plan.layers[name] for name in names}})


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _thinned(frontier: "Frontier", other_bytes: int, chosen: Point) -> tuple[Point, ...]:
    """The best plan within each of many budgets, evenly spaced by ratio, and the chosen plan."""
    tensor_bytes = frontier.cost_bytes + other_bytes
    kept: set[int] = set(range(len(frontier)))
    if len(frontier) > MAX_POINTS:
        budgets = np.geomspace(max(1, tensor_bytes[0]), tensor_bytes[-1], MAX_POINTS - 1)
        kept = {0, len(frontier) - 1, *np.searchsorted(tensor_bytes, budgets[1:-1], side="right") - 1}
    points = {int(tensor_bytes[i]): float(frontier.predicted_loss_change[i]) for i in kept}
    return tuple(sorted((points | dict([chosen])).items()))
