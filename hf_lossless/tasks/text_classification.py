"""Text classification: SST-2, MNLI, and other single sentences or pairs with one label."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from hf_lossless.errors import DataError
from hf_lossless.tasks.base import Row, class_labels, find_column
from hf_lossless.tasks.classification import Classification

_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
)
_SINGLE = ("text", "sentence", "content", "review")


class TextClassification(Classification):
    """One text, or a pair of texts, to one label."""

    name = "text-classification"
    head = "ForSequenceClassification"

    def load_model(self, model: str, **kwargs: Any) -> PreTrainedModel:
        """The model with a classification head."""
        loaded: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(model, **kwargs)
        return loaded

    def load_processor(self, model: str) -> Any:
        """Its tokenizer."""
        return AutoTokenizer.from_pretrained(model)

    def length(self, row: Row) -> int:
        """Characters of the row's texts."""
        return sum(len(row[column]) for column in _text_columns(row))

    def encode(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Token ids, padded to the longest row and cut at the model's length."""
        columns = _text_columns(rows[0])
        texts = []
        for column in columns:
            values = [row[column] for row in rows]
            wrong = next((value for value in values if not isinstance(value, str)), None)
            if wrong is not None:
                raise DataError(
                    f"the column {column!r} holds {wrong!r} ({type(wrong).__name__}) where text is expected. "
                    "Clean these rows, or name the right task with task= (--task)."
                )
            texts.append(values)
        longest = getattr(model.config, "max_position_embeddings", None)
        batch = processor(
            *texts, padding=True, truncation=True, max_length=_max_length(processor, longest), return_tensors="pt"
        )
        encoded = dict(batch)
        labels = class_labels(rows, model)
        if labels is not None:
            encoded["labels"] = labels
        return encoded


def _text_columns(row: Row) -> tuple[str, ...]:
    for pair in _PAIRS:
        if all(column in row for column in pair):
            return pair
    return (find_column(row, _SINGLE, "text"),)


def _max_length(processor: Any, longest: int | None) -> int | None:
    known = [length for length in (processor.model_max_length, longest) if length is not None and 0 < length < 10**6]
    return min(known, default=None)
