"""Text classification: SST-2, MNLI, and other single sentences or pairs with one label."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from hf_lossless.errors import ConfigurationError, DataError
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
        """Its tokenizer.

        Raises:
            ConfigurationError: There is none; transformers may make an empty one then, to which all text is unknown.
        """
        tokenizer = AutoTokenizer.from_pretrained(model)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ConfigurationError(
                f"{model} has no tokenizer: what transformers makes of it knows {len(tokenizer)} tokens, all special. "
                "Save the model's tokenizer there, or pass it as processor=."
            )
        return tokenizer

    def length(self, row: Row) -> int:
        """Characters of the row's texts."""
        return sum(len(_text(row, column)) for column in _text_columns(row))

    def encode(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Token ids, padded to the longest row and cut at the model's length."""
        texts = [[_text(row, column) for row in rows] for column in _text_columns(rows[0])]
        if processor.pad_token is None:
            raise ConfigurationError(
                f"the tokenizer ({type(processor).__name__}) has no padding token, and rows of a batch are padded. "
                "Set one, say tokenizer.pad_token = tokenizer.eos_token, and pass it as processor= or save it."
            )
        longest = _max_length(processor, model)
        batch = processor(*texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
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


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"the column {column!r} holds {value!r} ({type(value).__name__}) where text is expected. "
            "Clean these rows, or name the right task with task= (--task)."
        )
    return value


def _max_length(processor: Any, model: PreTrainedModel) -> int | None:
    """The most tokens that tokenizer and model allow, or None where neither says."""
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if (padding_idx := getattr(embeddings, "padding_idx", None)) is not None:  # RoBERTa's kin count from there
        positions -= padding_idx + 1
    known = [length for length in (processor.model_max_length, positions) if 0 < length < 10**6]
    return min(known, default=None)
