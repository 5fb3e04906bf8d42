"""Loss and metric of a model on a task's rows, and what it answers row by row.

Under several processes each runs its share of the batches, and all get the answers on all rows.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lossless.calibration.data import load_rows, make_batches
from hf_lossless.calibration.loss import model_device, to_device
from hf_lossless.calibration.processes import failing_together, gather_shares, process_state, progress_bar
from hf_lossless.certification.comparison import Outputs, refuse_one_class
from hf_lossless.errors import CalibrationError, DataError
from hf_lossless.tasks.base import LABEL_COLUMNS, Task

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Evaluation:
    """What a model does on some rows.

    Attributes:
        loss: Mean loss per example, in nats for classification.
        metric_name: Name of the task's metric.
        metric: Its value.
        num_examples: Rows.
    """

    loss: float
    metric_name: str
    metric: float
    num_examples: int


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model makes of labelled rows, in an order that depends on the rows alone.

    Attributes:
        model_name: Of its class.
        task: What judges it.
        losses: Loss of each row [rows].
        predictions: In the form of labels [rows, ...].
        labels: The same.
        logits: What the predictions were made of [rows, ..., classes].
    """

    model_name: str
    task: Task
    losses: Tensor
    predictions: Tensor
    labels: Tensor
    logits: Tensor

    @property
    def outputs(self) -> Outputs:
        """What a comparison with another model's answers takes.

        Raises:
            DataError: There are fewer than two rows, or the metric is undefined on them.
            CalibrationError: A loss is not finite.
        """
        if self.task.needs_two_classes:
            refuse_one_class(self.labels, self.task.metric_name)
        scores = self.task.example_scores(self.predictions, self.labels)
        return Outputs(self.losses, scores, self.predictions, self.logits)

    @property
    def evaluation(self) -> Evaluation:
        """Mean loss and metric.

        Raises:
            CalibrationError: The loss is not finite.
        """
        loss = self.losses.double().mean().item()
        if not math.isfinite(loss):
            raise CalibrationError(
                f"the loss of {self.model_name} on these {len(self.losses)} rows is {loss}. "
                "Check the model's weights and its dtype (float16 overflows where bfloat16 does not)."
            )
        return Evaluation(
            loss=loss,
            metric_name=self.task.metric_name,
            metric=self.task.metric(self.predictions, self.labels),
            num_examples=len(self.losses),
        )


def evaluate(model: PreTrainedModel, dataset: Any, task: Task, processor: Any, split: str | None = None) -> Evaluation:
    """Runs a model over labelled rows; one forward pass.

    Args:
        model: Compressed or not; put in evaluation mode.
        dataset: Rows, as `load_rows` takes them; all are used.
        task: The model's task.
        processor: Its tokenizer or image processor.
        split: The split of a DatasetDict or Hub dataset.

    Raises:
        DataError: The rows have no labels, or cannot be used.
        CalibrationError: The loss is not finite.
    """
    return answers(model, load_rows(dataset, split), task, processor).evaluation


def answers(
    model: PreTrainedModel, rows: datasets.Dataset, task: Task, processor: Any, what: str = "evaluating"
) -> Answers:
    """What a model makes of each of some labelled rows; one forward pass.

    Args:
        model: Compressed or not; put in evaluation mode.
        rows: The same in every process; all are used.
        task: The model's task.
        processor: Its tokenizer or image processor.
        what: Name of the progress bar.

    Raises:
        DataError: The rows have no labels, or cannot be used.
    """
    refuse_unlabelled(rows, "Evaluation needs labels")
    model.eval()  # type: ignore[no-untyped-call]
    with failing_together():
        own = list(_own_batches(model, rows, task, processor, what))
    losses, predictions, labels, logits = zip(*gather_shares(own), strict=True)
    return Answers(type(model).__name__, task, *map(torch.cat, (losses, predictions, labels, logits)))


def refuse_unlabelled(rows: datasets.Dataset, why: str) -> None:
    """Ends with an error where rows have no label column.

    Raises:
        DataError: They have none.
    """
    if not any(name in rows.column_names for name in LABEL_COLUMNS):
        raise DataError(
            f"the rows have no label column: looked for {', '.join(LABEL_COLUMNS)}, found "
            f"{', '.join(rows.column_names)}. {why}: rename a column, or take labelled rows."
        )


def _own_batches(
    model: PreTrainedModel, rows: datasets.Dataset, task: Task, processor: Any, what: str
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Losses, predictions, labels and logits of this process's batches."""
    state = process_state()
    device = model_device(model)
    first, step = state.process_index, state.num_processes
    batches = make_batches(rows, task, processor, model, _BATCH_SIZE, first, step)
    total = len(range(first, -(-len(rows) // _BATCH_SIZE), step))
    with progress_bar(total, what) as advance:
        for batch in batches:
            logits = _logits(model, to_device(batch, device))
            labels = batch["labels"]
            yield task.example_losses(logits, labels), task.predict(logits), labels, logits
            advance()


def _logits(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert isinstance(logits, Tensor)
    return logits.cpu()
