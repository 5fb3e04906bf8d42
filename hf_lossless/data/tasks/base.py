"""What every task provides, and what it makes of rows.

A row of the data set is what a user counts, what the splits are made of, and what the certificate compares: a text, a
question, an image. A model may see a row in several pieces (the strides of a long context, the blocks of a long text);
a task puts its answers to these together again, to one loss, one score and one prediction a row.
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
    """The model's outputs for a batch."""
    with torch.no_grad():
        return model(**{name: value.to(model.device) for name, value in batch.items()})


@dataclass(frozen=True, eq=False)
class RowAnswers:
    """What a model makes of rows, one entry for each.

    Attributes:
        losses: Loss [rows].
        scores: The certified metric [rows], between 0 and 1.
        predictions: The answer: a class, a text, tokens. Two that are equal are the same answer.
        references: What would be right, in the form that the task's metrics take.
        logits: What the prediction was chosen by [rows, ..., classes], -inf for classes that there are not; None where
            they would take too much memory.
    """

    losses: Tensor
    scores: Tensor
    predictions: list[Any]
    references: list[Any]
    logits: Tensor | None = None

    @classmethod
    def concatenated(cls, parts: Sequence["RowAnswers"]) -> "RowAnswers":
        """Answers to the rows of all parts, one after the other."""
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(
            torch.cat([part.losses for part in parts]),
            torch.cat([part.scores for part in parts]),
            [one for part in parts for one in part.predictions],
            [one for part in parts for one in part.references],
            _stacked(logits) if logits else None,
        )


def _stacked(logits: Sequence[Tensor]) -> Tensor:
    """Logits of all rows, as wide as the widest."""
    width = max(part.shape[-1] for part in logits)
    return torch.cat([F.pad(part, (0, width - part.shape[-1]), value=-torch.inf) for part in logits])


class Task(ABC):
    """A task: rows to batches, outputs to an answer for each row.

    Attributes:
        name: The Hub's pipeline tag.
        heads: What the class names of models that do this task have after the architecture's name.
        auto_class: transformers' AutoModelFor...
        metric_name: The metric that a certificate watches; `RowAnswers.scores` are its values row by row.
        target_columns: What the column of what is right may be called; none where the inputs themselves are it.
        split_columns: Inputs that rows of different splits must not share; none: they must differ as a whole.
        has_label_names: Whether labels have names that the model knows too; a number of a choice has none.
        needs_two_classes: Whether the metric is undefined on rows that are all of one class (F1, correlations).
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
        """The model with the task's head; `kwargs` are those of from_pretrained."""
        loaded: PreTrainedModel = self.auto_class.from_pretrained(model, **kwargs)
        return loaded

    @abstractmethod
    def load_processor(self, model: str) -> Any:
        """The tokenizer or image processor saved with a model."""

    @abstractmethod
    def input_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """The columns that hold what a model sees.

        Raises:
            DataError: A data set with these columns is of another task.
        """

    def columns_of(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows with nothing but the columns that this task reads, and their ids.

        Raises:
            DataError: The rows are of another task.
        """
        read = (*self.input_columns(rows.column_names), *self.target_columns, ID_COLUMN)
        return rows.select_columns([name for name in dict.fromkeys(read) if name in rows.column_names])

    def for_rows(self, rows: datasets.Dataset) -> Self:
        """The task as these rows state it, where a data set as a whole decides what its rows mean."""
        return self

    @abstractmethod
    def length(self, row: Row) -> int | None:
        """What a row costs to run, so that rows of like length can share a batch; None where all cost the same."""

    @abstractmethod
    def batches(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> Iterable[dict[str, Tensor]]:
        """The model's arguments for some rows, with its labels where the rows have them.

        Raises:
            DataError: The rows hold what the task or the model cannot use.
        """

    @abstractmethod
    def own_targets(self, batch: Mapping[str, Tensor], outputs: Any) -> dict[str, Tensor]:
        """Labels for a batch that has none: what the model itself says.

        Raises:
            DataError: What it says cannot stand in for labels.
        """

    @abstractmethod
    def answer(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> RowAnswers:
        """Runs the model on some labelled rows; without gradients.

        Raises:
            DataError: The rows hold what the task or the model cannot use.
        """

    @abstractmethod
    def metrics(self, answers: RowAnswers) -> dict[str, float]:
        """The task's metrics over all rows, first the one that a certificate watches."""

    def refuse_unlabelled(self, rows: datasets.Dataset, why: str) -> None:
        """Ends with an error where rows lack the column of what is right.

        Raises:
            DataError: They have none.
        """
        if self.target_columns and not any(name in rows.column_names for name in self.target_columns):
            what = "answers" if "answers" in self.target_columns else "label"
            raise DataError(
                f"the rows have no {what} column: looked for {', '.join(self.target_columns)}, found "
                f"{', '.join(rows.column_names)}. {why}: rename a column, or take labelled rows."
            )
