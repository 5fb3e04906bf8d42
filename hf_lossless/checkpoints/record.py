"""compression.json: details of a compression that config.json does not keep, for pictures and reports.

It is saved beside config.json. Loading does not read it, so it counts in no size.
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
"""The largest number of frontier points in a record; a picture shows no more."""

_Bytes = Annotated[int, Field(ge=0)]
_Number = Annotated[float, Field(allow_inf_nan=False)]

Point = tuple[_Bytes, _Number]
"""Bytes of all tensors, and the predicted change of the mean loss."""


class CompressionRecord(Record):
    """Describes how a model was compressed.

    Attributes:
        format_version: Version of this record.
        theory: The theory that predicted the loss changes.
        original_bytes: Bytes of all the original's tensors.
        size_bytes: Bytes of the whole checkpoint: its tensors, and its entry in config.json.
        chosen: The chosen plan, a point of the frontier.
        measured_loss_change: Measured loss change of the finished model on the calibration rows; None: not finite.
        measured_loss_change_error: Its standard error; None where there was one batch.
        frontier: The plans that no other plan beats, by ascending bytes; thinned, with both ends and the chosen one.
        frontier_plans: Number of plans before thinning.
        resolution_bytes: Bytes to which the search rounded costs; 0: the frontier is exact.
        bound: Lower bound for all ways to store the weights, by ascending bytes; None where it was not computed.
        checks: All predictions that were compared with measurements.
        layer_order: The layers' names in the model's own order, which config.json does not keep.
        calibration_rows: Number of calibration rows.
        calibration_loss: The original's mean loss on the calibration rows.
        not_smaller: Why no smaller plan is certified; None without a certificate.
        versions: Versions of the libraries, by name.
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
        """Computes the bytes of the original model's tensors over `size_bytes`."""
        return self.original_bytes / self.size_bytes

    @property
    def negligible(self) -> float:
        """Computes a negligible loss change: a thousandth of the loss, as for the planner; above 0."""
        return max(NEGLIGIBLE_SHARE * abs(self.calibration_loss), 1e-9)


def record_of(result: "CompressionResult") -> CompressionRecord:
    """Makes the record of a compression.

    Args:
        result: The result of `compress`, or of a first load: `model.hf_quantizer.result`.

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
    """Writes a record into a saved folder, completely or not at all; an existing one is replaced."""
    write_file(Path(folder) / FILE_NAME, record.model_dump_json() + "\n")


def read_record_of(folder: str | PathLike[str], plan: CompressionPlan) -> CompressionRecord | None:
    """Reads the record of a saved folder; None where it has none.

    Args:
        folder: The folder.
        plan: The plan in its config.json.

    Raises:
        CheckpointError: The record is malformed or cannot be read, or belongs to another plan than the one in
            config.json.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return None
    remedy = f"Delete {path}, which only reports need, or take it again from where it came from."
    record = read_record(CompressionRecord, read_json(path, remedy, remedy), str(path), CheckpointError, remedy)
    ours, theirs = (record.theory, record.chosen[1]), (plan.theory, plan.predicted_loss_change)
    # The sum of the same numbers in another order may differ in its last digits.
    if ours[0] != theirs[0] or not math.isclose(ours[1], theirs[1], rel_tol=1e-6, abs_tol=1e-12):
        raise CheckpointError(
            f"{path} is of another plan ({ours[0]}, predicted change {ours[1]:.4g}) than the one in config.json "
            f"({theirs[0]}, {theirs[1]:.4g}). {remedy}"
        )
    return record


def plan_in_order(plan: CompressionPlan, record: CompressionRecord | None) -> CompressionPlan:
    """Puts a saved plan's layers into the model's own order; config.json sorts them by name, 10 before 2.

    Args:
        plan: The plan of a saved folder.
        record: The record of the same folder; None: layers are sorted by name, with numbers in numeric order.

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
    """Selects the best plan within each of many budgets, evenly spaced by ratio, and the chosen plan."""
    tensor_bytes = frontier.cost_bytes + other_bytes
    kept: set[int] = set(range(len(frontier)))
    if len(frontier) > MAX_POINTS:
        budgets = np.geomspace(max(1, tensor_bytes[0]), tensor_bytes[-1], MAX_POINTS - 1)
        kept = {0, len(frontier) - 1, *np.searchsorted(tensor_bytes, budgets[1:-1], side="right") - 1}
    points = {int(tensor_bytes[i]): float(frontier.predicted_loss_change[i]) for i in kept}
    return tuple(sorted((points | dict([chosen])).items()))
