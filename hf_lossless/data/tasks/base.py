"""The base class of all tasks, and the answers of a model to a task's rows.

A row of the data set is what a user counts, what the splits are made of, and what the certificate compares: a text, a
question, an image. A model may see a row in several pieces (the strides of a long context, the blocks of a long text);
the task joins the answers to these pieces into one loss, one score and one prediction for each row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_lossless.data.tasks.columns import ID_COLUMN, Row
from hf_lossless.errors import DataError


def run(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Any:
    """Runs a model on a batch, without gradients, and returns its outputs."""
    with torch.no_grad():
        return model(**{name: value.to(model.device) for name, value in batch.items()})


@dataclass(frozen=True, eq=False)
class RowAnswers:
    """A model's losses, scores and predictions for some rows, one entry for each row.

    Attributes:
        losses: Loss of each row, [rows].
        scores: The certified metric of each row, [rows], between 0 and 1.
        predictions: The answer to each row: a class, a text, or tokens; compared by equality.
        references: The correct answers, in the form that the task's metrics take.
        logits: The logits behind each prediction, [rows, ..., classes], -inf for classes that a row does not have; None
            where they would take too much memory.
    """

    losses: Tensor
    scores: Tensor
    predictions: list[Any]
    references: list[Any]
    logits: Tensor | None = None

    @classmethod
    def concatenated(cls, parts: Sequence["RowAnswers"]) -> "RowAnswers":
        """Concatenates the answers to several parts of the rows."""
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(
            torch.cat([part.losses for part in parts]),
            torch.cat([part.scores for part in parts]),
            [one for part in parts for one in part.predictions],
            [one for part in parts for one in part.references],
            _stacked(logits) if logits else None,
        )


def _stacked(logits: Sequence[Tensor]) -> Tensor:
    """Concatenates the logits of all rows, padded to the widest."""
    width = max(part.shape[-1] for part in logits)
    return torch.cat([F.pad(part, (0, width - part.shape[-1]), value=-torch.inf) for part in logits])


class Task(ABC):
    """A task: rows to batches, outputs to an answer for each row.

    Attributes:
        name: The Hub's pipeline tag.
        heads: Endings of the class names of models that do this task, after the architecture's name.
        auto_class: transformers' AutoModelFor...
        metric_name: The metric that a certificate watches; `RowAnswers.scores` are its values row by row.
        target_columns: Possible names of the column of correct answers; empty where the inputs themselves are the
            targets.
        split_columns: Input columns whose values no two splits may share; None: all input columns together.
        has_label_names: Whether labels have names that the model knows too; the number of a choice has no name.
        needs_two_classes: Whether the metric is undefined where all rows are of one class (F1, correlations).
    """

    name: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]
    auto_class: ClassVar[Any]
    metric_name: ClassVar[str]
    target_columns: ClassVar[tuple[str, ...]]
    split_columns: ClassVar[tuple[str, ...] | None] = None
    has_label_names: ClassVar[bool] = False
    needs_two_classes: ClassVar[bool] = False

    def load_model(self, model: str, **kwargs: Any) -> PreTrainedModel:
        """Loads the model with the task's head; `kwargs` are those of from_pretrained."""
        loaded: PreTrainedModel = self.auto_class.from_pretrained(model, **kwargs)
        return loaded

    @abstractmethod
    def load_processor(self, model: str) -> Any:
        """Loads the tokenizer or image processor saved with a model."""

    @abstractmethod
    def input_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Finds the columns that hold a model's inputs.

        Raises:
            DataError: The columns belong to a data set of another task.
        """

    def columns_of(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Selects the columns that this task reads, and the rows' ids.

        Raises:
            DataError: The rows are of another task.
        """
        read = (*self.input_columns(rows.column_names), *self.target_columns, ID_COLUMN)
        return rows.select_columns([name for name in dict.fromkeys(read) if name in rows.column_names])

    def for_rows(self, rows: datasets.Dataset) -> Self:
        """Returns the task configured for these rows, where the whole data set decides what a row means."""
        return self

    @abstractmethod
    def length(self, row: Row) -> int | None:
        """Measures the length of a row, so that rows of similar length share a batch; None where all are equal."""

    @abstractmethod
    def batches(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> Iterable[dict[str, Tensor]]:
        """Encodes some rows as the model's arguments, with labels where the rows have them.

        Raises:
            DataError: The rows hold values that the task or the model cannot use.
        """

    @abstractmethod
    def own_targets(self, batch: Mapping[str, Tensor], outputs: Any) -> dict[str, Tensor]:
        """Makes labels for an unlabelled batch from the model's own outputs.

        Raises:
            DataError: The outputs cannot stand in for labels.
        """

    @abstractmethod
    def answer(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> RowAnswers:
        """Runs the model on some labelled rows; without gradients.

        Raises:
            DataError: The rows hold values that the task or the model cannot use.
        """

    @abstractmethod
    def metrics(self, answers: RowAnswers) -> dict[str, float]:
        """Computes the task's metrics over all rows; the first is the one that a certificate watches."""

    def refuse_unlabelled(self, rows: datasets.Dataset, why: str) -> None:
        """Raises an error where rows lack the column of correct answers.

        Raises:
            DataError: The rows have no such column.
        """
        if self.target_columns and not any(name in rows.column_names for name in self.target_columns):
            what = "answers" if "answers" in self.target_columns else "label"
            raise DataError(
                f"the rows have no {what} column: looked for {', '.join(self.target_columns)}, found "
                f"{', '.join(rows.column_names)}. {why}: rename a column, or take labelled rows."
            )
