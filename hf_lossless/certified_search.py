"""`compress_certified`: finds the smallest plan that held-out rows cannot distinguish from the original.

split the rows -> calibrate and analyse once -> search on the selection rows -> walk on the certification rows

**Search.** Between a safe plan, a quarter of the way to the smallest plan (by the logarithm of the ratio), and the
smallest plan, `SEARCH_STEPS` plans are made one after the other. Each is realised on a copy of the model and run over
the selection rows, which gives its probability to pass. The next ratio is where another plan gains most
(`certification.selection.next_ratio`), so that the ladder is fine where the probability falls.

**Walk.** The measured plans are put into a fixed order (`certification.selection`), and tested on the certification
rows one by one until one fails (`certification.walk`). The tensors that passed are then put into the model.

**Cost.** One analysis; `SEARCH_STEPS` + 1 plans and as many passes over the selection rows; a pass over the
certification rows for each plan tested; and one pass of the original over both. Memory: the model, a copy, and the
compressed copies for the walk, each a few times smaller.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lossless.certification.certificate import MIN_ROWS, Certificate, Provenance
from hf_lossless.certification.certify import certify
from hf_lossless.certification.comparison import Outputs
from hf_lossless.certification.evaluation import answers
from hf_lossless.certification.selection import chance_to_pass, next_ratio, order_of_proposals
from hf_lossless.certification.walk import Walk, walk
from hf_lossless.compression import (
    CompressionResult,
    analyse,
    attach_quantizer,
    checks_of,
    compress,
    evaluation_mode,
    no_rows_to_hold_back,
    realise,
)
from hf_lossless.config import LosslessCompressionConfig
from hf_lossless.data.rows import Rows, batches_of_rows, calibration_batches, load_rows, processor_of, ready_batches
from hf_lossless.data.splits import (
    Splits,
    assign,
    fingerprint,
    refuse_overlap,
    row_digests,
    three_splits,
)
from hf_lossless.data.tasks.base import Task
from hf_lossless.data.tasks.registry import task_of
from hf_lossless.errors import CalibrationError, DataError, UnreachableTargetError
from hf_lossless.planning.knapsack import Frontier
from hf_lossless.planning.loss_check import LossCheck
from hf_lossless.planning.planner import Planner
from hf_lossless.planning.target import Target
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.tied import Tied
from hf_lossless.storage.plan import CompressionPlan, checkpoint_bytes

SEARCH_STEPS = 10
"""Number of plans that are measured beside the safe one."""

_ANY_RATIO = 1e-3  # every plan meets it


@dataclass(frozen=True, eq=False)
class _Measured:
    """A plan realised on a copy of the model, and its estimated probability to pass."""

    plan: CompressionPlan
    frontier: Frontier
    model: PreTrainedModel
    checks: tuple[LossCheck, ...]
    measured_loss_change: float
    chance: float

    @property
    def ratio(self) -> float:
        return self.plan.original_bytes / checkpoint_bytes(self.plan)


def compress_pretrained(
    model: PreTrainedModel, config: LosslessCompressionConfig, *, original_bytes: int | None = None
) -> CompressionResult:
    """Compresses a model of transformers in place, with the rows that the configuration names.

    Args:
        model: The model on its devices; put in evaluation mode.
        config: The configuration: a tolerance is certified, another target is met by predictions.
        original_bytes: As for `compression.compress`.

    Raises:
        LosslessError: As for `compress_certified` and `compression.compress`.
    """
    with torch.enable_grad():  # the caller may be under no_grad
        if config.target.tolerance is not None:
            return compress_certified(model, config, original_bytes=original_bytes)
        return compress(model, calibration_batches(model, config.rows), config, original_bytes=original_bytes)


def compress_certified(
    model: PreTrainedModel, config: LosslessCompressionConfig, *, original_bytes: int | None = None
) -> CompressionResult:
    """Compresses a model in place, as far as `config.tolerance` can be certified.

    Args:
        model: The model on its devices; put in evaluation mode.
        config: Tolerance, confidence, metric margin and rows.
        original_bytes: As for `compression.compress`.

    Returns:
        The model under the last plan that passed, with its certificate. Where none passed, the model is under the first
        plan tested, which is the safest, and its certificate says "not certified: ...".

    Raises:
        ConfigurationError: The dataset is ready batches, or the model cannot be compressed.
        DataError: Certification rows are among the others, have no labels, or there are too few to split at all.
        CalibrationError: The original's loss is not finite, or that of the safest plan.
    """
    tolerance = config.target.tolerance
    assert tolerance is not None
    if ready_batches(config.rows.dataset) is not None:
        raise no_rows_to_hold_back(config)
    task = task_of(model, config.rows.task)
    splits = _splits(config.rows, task)
    processor = processor_of(model, config.rows, task)
    asked = {
        "tolerance": tolerance,
        "metric_margin": config.target.metric_margin,
        "confidence": config.target.confidence,
    }

    def outputs(judged: PreTrainedModel, rows: datasets.Dataset, what: str) -> Outputs:
        return answers(judged, rows, task, processor, what).outputs

    with evaluation_mode(model):
        original_selection = outputs(model, splits.selection, "original, selection rows")
        original_certification = outputs(model, splits.certification, "original, certification rows")
        batches = batches_of_rows(model, splits.calibration, config.rows)
        planner = analyse(model, batches, config, original_bytes=original_bytes)

        def measure(ratio: float) -> _Measured:
            planned = planner.plan(Target(ratio=ratio))
            twin = copy.deepcopy(model)
            measured_change = realise(twin, planner.problem, planned, config.choices.runtime)
            try:
                selection = outputs(twin, splits.selection, "a plan, selection rows")
                chance = chance_to_pass(original_selection, selection, len(splits.certification), **asked)
            except CalibrationError:  # a loss that is not finite
                chance = 0.0
            checks = checks_of(planner.problem, planned, measured_change)
            return _Measured(planned.plan, planned.frontier, twin, checks, measured_change.mean, chance)

        measured = _search(planner, measure, worthwhile=len(splits.certification) >= MIN_ROWS)
        proposals = order_of_proposals(measured)
        provenance = Provenance(
            data_fingerprint=fingerprint(splits.certification),
            calibration_rows=min(config.rows.num_samples, len(splits.calibration)),
            selection_rows=len(splits.selection),
            theory=config.theory,
            seed=config.rows.seed,
            runtime=config.choices.runtime,
        )

        def certify_plan(proposal: _Measured) -> Certificate:
            certification = outputs(proposal.model, splits.certification, "a plan, certification rows")
            return certify(original_certification, certification, provenance, metric_name=task.metric_name, **asked)

        found = walk(proposals, certify_plan)
    chosen = found.plan if found.plan is not None else proposals[0]
    others = [one for one in measured if one is not chosen]
    take_over(model, chosen.model)
    model.eval()  # type: ignore[no-untyped-call]
    result = CompressionResult(
        model,
        chosen.plan,
        chosen.frontier,
        planner.problem.calibration.without_tensors(),
        checkpoint_bytes(chosen.plan, found.certificate.to_dict()),
        chosen.measured_loss_change,
        tuple(check for one in (*others, chosen) for check in one.checks),
        planner.bound(),
        found.certificate,
        _not_smaller(found, proposals, measured),
    )
    attach_quantizer(result)
    return result


def _splits(given: Rows, task: Task) -> Splits:
    """Makes the three splits: those that the user gives, and the rest by a hash of the rows of `dataset`.

    Where one of the held-out splits is given, `dataset` is split into the two others, and the other held-out split gets
    the share of both.

    Raises:
        DataError: Rows cannot be used, overlap, or are too few.
    """
    rows = task.columns_of(load_rows(given.dataset, given.split))
    selection, certification = (
        None if held_out is None else task.columns_of(load_rows(held_out))
        for held_out in (given.selection_dataset, given.certification_dataset)
    )
    if selection is None and certification is None:
        splits = three_splits(rows, given.seed, columns=task.split_columns)
    elif selection is not None and certification is not None:
        splits = Splits(rows, selection, certification)
    else:
        is_calibration = assign(row_digests(rows, task.split_columns), given.seed) == 0
        calibration, rest = (rows.select(np.flatnonzero(chosen)) for chosen in (is_calibration, ~is_calibration))
        splits = Splits(
            calibration,
            rest if selection is None else selection,
            rest if certification is None else certification,
        )
    sizes = [len(splits.calibration), len(splits.selection), len(splits.certification)]
    if sizes[0] < 1 or min(sizes[1:]) < 2:
        raise DataError(
            f"there are {sizes[0]}, {sizes[1]} and {sizes[2]} rows for calibration, selection and certification. A "
            f"certificate takes at least {MIN_ROWS} to certify on, and 2 to say anything. Give more rows, or another "
            "target than tolerance=, say ratio=6."
        )
    for held_out in (splits.selection, splits.certification):
        task.refuse_unlabelled(
            held_out, "A certificate needs labels (the targets ratio=, max_bytes= and loss_budget= do not)"
        )
    refuse_overlap(splits.certification, splits.calibration)
    refuse_overlap(splits.certification, splits.selection, what="selection")
    return splits


def _search(
    planner: Planner,
    measure: Callable[[float], _Measured],
    *,
    worthwhile: bool,
) -> list[_Measured]:
    """Measures plans and sorts them from the largest to the smallest; only the safe one where none can be certified."""
    most = _largest_ratio(planner)
    safe_ratio = most**0.25 if most > 1 else _ANY_RATIO
    safe = measure(safe_ratio)
    found = [safe]
    chances = {safe_ratio: safe.chance, most: 0.0}  # the smallest plan is assumed to fail
    for _ in range(SEARCH_STEPS if worthwhile and most > 1 else 0):
        ratio = next_ratio(chances)
        if ratio is None:
            break
        try:
            measured = measure(ratio)
        except UnreachableTargetError:  # because of the bytes of its JSON
            chances[ratio] = 0.0
            continue
        chances[ratio] = measured.chance
        if all(measured.plan != other.plan for other in found):
            found.append(measured)
    return sorted(found, key=lambda measured: measured.ratio)


def _largest_ratio(planner: Planner) -> float:
    """Computes the ratio of the smallest plan, up to differences in the bytes of its JSON."""
    plan, frontier = (largest := planner.plan(Target(ratio=_ANY_RATIO))).plan, largest.frontier
    text_bytes = checkpoint_bytes(plan) - plan.tensor_bytes
    return plan.original_bytes / (int(frontier.cost_bytes[0]) + plan.other_bytes + text_bytes)


def _not_smaller(found: Walk[_Measured], proposals: Sequence[_Measured], measured: Sequence[_Measured]) -> str | None:
    """Explains why the walk ended; None where the certificate itself does."""
    if found.plan is None:
        return None
    if found.stopped is not None:
        return f"the next plan, {proposals[found.tested - 1].ratio:.2f} times smaller, is {found.stopped}"
    smaller = [other.ratio for other in measured if other.ratio > found.plan.ratio]
    if smaller:
        return f"on the selection rows smaller plans (from {min(smaller):.2f} times on) were unlikely to pass"
    return "there is hardly a smaller plan"


def take_over(model: nn.Module, compressed: nn.Module) -> None:
    """Moves the tensors of a compressed copy into the model; the copy must not be used afterwards.

    Args:
        model: The original, of which `compressed` was a copy; objects other than its compressed layers are kept.
        compressed: The copy.
    """
    for name, module in list(compressed.named_modules(remove_duplicate=False)):
        if isinstance(module, CompressedModule | Tied):
            model.set_submodule(name, module)
    with torch.no_grad():
        model.load_state_dict(compressed.state_dict())
