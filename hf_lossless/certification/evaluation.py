"""Evaluates a model on a task's labelled rows: loss, metric, and the answer to each row.

With several processes each runs its share of the batches, and all get the answers to all rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers import PreTrainedModel

from hf_lossless.certification.comparison import Outputs, refuse_one_class
from hf_lossless.data.processes import failing_together, gather_shares, process_state, progress_bar
from hf_lossless.data.rows import load_rows, row_groups
from hf_lossless.data.tasks.base import RowAnswers, Task
from hf_lossless.errors import CalibrationError

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Evaluation:
    """The loss and metrics of a model on some rows.

    Attributes:
        loss: Mean loss per row, in nats.
        metric_name: Name of the metric that a certificate watches.
        metric: Value of that metric.
        num_examples: Number of rows.
        other_metrics: The task's other metrics, by name.
    """

    loss: float
    metric_name: str
    metric: float
    num_examples: int
    other_metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's answers to labelled rows, in an order that depends on the rows alone.

    Attributes:
        model_name: Name of the model's class.
        task: The task that judges the answers.
        rows: Loss, score and prediction of each row.
    """

    model_name: str
    task: Task
    rows: RowAnswers

    @property
    def outputs(self) -> Outputs:
        """Returns the outputs for a comparison with another model.

        Raises:
            DataError: There are fewer than two rows, or the metric is undefined on them.
            CalibrationError: A loss is not finite.
        """
        rows = self.rows
        if self.task.needs_two_classes:
            refuse_one_class(rows.references, self.task.metric_name)
        return Outputs(rows.losses, rows.scores, rows.predictions, rows.logits)

    @property
    def evaluation(self) -> Evaluation:
        """Computes the mean loss and the metrics.

        Raises:
            CalibrationError: The loss is not finite.
        """
        losses = self.rows.losses
        loss = losses.double().mean().item()
        if not math.isfinite(loss):
            raise CalibrationError(
                f"the loss of {self.model_name} on these {len(losses)} rows is {loss}. "
                "Check the model's weights and its dtype (float16 overflows where bfloat16 does not)."
            )
        others = self.task.metrics(self.rows)
        metric = others.pop(self.task.metric_name)
        return Evaluation(loss, self.task.metric_name, metric, len(losses), others)


def evaluate(model: PreTrainedModel, dataset: Any, task: Task, processor: Any, split: str | None = None) -> Evaluation:
    """Evaluates a model on labelled rows; one forward pass.

    Args:
        model: A model, compressed or not; put in evaluation mode.
        dataset: Rows, as `load_rows` takes them; all are used.
        task: The model's task.
        processor: The task's tokenizer or image processor.
        split: The split of a DatasetDict or Hub dataset.

    Raises:
        DataError: The rows have no labels, or cannot be used.
        CalibrationError: The loss is not finite.
    """
    return answers(model, load_rows(dataset, split), task, processor).evaluation


def answers(
    model: PreTrainedModel, rows: datasets.Dataset, task: Task, processor: Any, what: str = "evaluating"
) -> Answers:
    """Runs a model on labelled rows and collects its answers; one forward pass.

    Args:
        model: A model, compressed or not; put in evaluation mode.
        rows: The rows, the same in every process; all are used.
        task: The model's task.
        processor: The task's tokenizer or image processor.
        what: Name of the progress bar.

    Raises:
        DataError: The rows have no labels, or cannot be used.
    """
    rows = task.columns_of(rows)
    task.refuse_unlabelled(rows, "Evaluation needs labels")
    task = task.for_rows(rows)
    model.eval()  # type: ignore[no-untyped-call]
    with failing_together():
        own = list(_own_answers(model, rows, task, processor, what))
    return Answers(type(model).__name__, task, RowAnswers.concatenated(gather_shares(own)))


def _own_answers(
    model: PreTrainedModel, rows: datasets.Dataset, task: Task, processor: Any, what: str
) -> Iterator[RowAnswers]:
    """Yields the answers to this process's groups of rows."""
    state = process_state()
    first, step = state.process_index, state.num_processes
    total = len(range(first, -(-len(rows) // _BATCH_SIZE), step))
    with progress_bar(total, what) as advance:
        for group in row_groups(rows, task, model, _BATCH_SIZE, first, step):
            yield task.answer(group, processor, model)
            advance()
