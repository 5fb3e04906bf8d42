"""What every task provides, and the columns that a data set calls them by."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lossless.errors import ConfigurationError, DataError

Row = Mapping[str, Any]


class Task(ABC):
    """A task: rows to batches, outputs to per-example losses and a metric.

    Attributes:
        name: The Hub's pipeline tag.
        head: What the class names of models that do this task have after the architecture's name.
        metric_name: Name of the metric, as it is reported.
        needs_two_classes: Whether the metric is undefined on rows that are all of one class (F1, correlations).
    """

    name: ClassVar[str]
    head: ClassVar[str]
    metric_name: ClassVar[str]
    needs_two_classes: ClassVar[bool] = False

    @abstractmethod
    def load_model(self, model: str, **kwargs: Any) -> PreTrainedModel:
        """`AutoModelFor...from_pretrained`."""

    @abstractmethod
    def load_processor(self, model: str) -> Any:
        """The tokenizer or image processor saved with a model."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """A batch of the model's arguments, with "labels" where the rows have them.

        Raises:
            DataError: The rows are of another task, or a label is not one of the model's.
        """

    @abstractmethod
    def length(self, row: Row) -> int | None:
        """What a row costs to run, so that rows of like length can share a batch; None where all cost the same."""

    @abstractmethod
    def predict(self, logits: Tensor) -> Tensor:
        """The model's answers, in the form of labels."""

    @abstractmethod
    def example_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each example [examples]; their mean is the loss the model itself returns."""

    @abstractmethod
    def example_scores(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """The metric of each example [examples], between 0 and 1, for tests that are paired row by row."""

    @abstractmethod
    def metric(self, predictions: Tensor, labels: Tensor) -> float:
        """The task's metric over all examples, between 0 and 1."""


def find_column(row: Row, names: Sequence[str], what: str) -> str:
    """The first of `names` that the row has.

    Raises:
        DataError: It has none; the message lists what was looked for and what was found.
    """
    for name in names:
        if name in row:
            return name
    raise DataError(
        f"the rows have no {what} column: looked for {', '.join(names)}, found {', '.join(row) or 'none'}. "
        "Rename a column, or name the right task with task= (--task)."
    )


LABEL_COLUMNS = ("label", "labels", "fine_label")


def class_labels(rows: Sequence[Row], model: PreTrainedModel) -> Tensor | None:
    """Class indices [rows], or None where the rows have no label column.

    A label is an index below the model's number of labels, or one of its label names.

    Raises:
        DataError: A label is neither.
        ConfigurationError: The model does not choose one label of several.
    """
    num_labels = int(model.config.num_labels or 0)
    problem_type = getattr(model.config, "problem_type", None)
    if num_labels < 2 or problem_type not in (None, "single_label_classification"):
        raise ConfigurationError(
            f"{type(model).__name__} does not choose one label of several (num_labels={num_labels}, "
            f"problem_type={problem_type!r}): regression and several labels at once are not among the tasks here. "
            "Give ready batches with the labels that the model expects as dataset."
        )
    column = next((name for name in LABEL_COLUMNS if name in rows[0]), None)
    if column is None:
        return None
    label2id = model.config.label2id or {}
    labels = []
    for row in rows:
        label = row[column]
        if isinstance(label, str):
            label = label2id.get(label, label)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_labels:
            raise DataError(
                f"the label {row[column]!r} in column {column!r} is not one of the model's {num_labels} labels "
                f"(0 to {num_labels - 1}, or {', '.join(list(label2id)[:10])}). "
                "Use the data that the model was trained for, or drop rows without a label."
            )
        labels.append(label)
    return torch.tensor(labels)
