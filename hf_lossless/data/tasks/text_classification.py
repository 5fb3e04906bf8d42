"""Text classification: SST-2, MNLI, and other single sentences or pairs with one label."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_lossless.data.tasks.classification import Classification
from hf_lossless.data.tasks.columns import Row, find_column, text_of
from hf_lossless.data.tasks.labels import class_labels
from hf_lossless.data.tasks.tokenization import load_tokenizer, max_length, refuse_nothing, require_padding

_PAIRS = (
    ("premise", "hypothesis"),  # MNLI, SNLI, RTE in SuperGLUE
    ("sentence1", "sentence2"),  # MRPC, RTE, WNLI
    ("question1", "question2"),  # QQP
    ("question", "sentence"),  # QNLI
    ("text", "text_pair"),
)
_SINGLE = ("text", "sentence", "content", "review")


class TextClassification(Classification):
    """The task of choosing one label for a text or a pair of texts."""

    name = "text-classification"
    heads = ("ForSequenceClassification",)
    has_label_names = True
    auto_class = AutoModelForSequenceClassification

    def load_processor(self, model: str) -> Any:
        """Loads the model's tokenizer.

        Raises:
            ConfigurationError: The model has no tokenizer.
        """
        return load_tokenizer(model)

    def input_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Finds both columns of a pair, or the one of a single text."""
        for pair in _PAIRS:
            if all(column in names for column in pair):
                return pair
        return (find_column(names, _SINGLE, "text"),)

    def length(self, row: Row) -> int:
        """Counts the characters of the row's texts."""
        return sum(len(text_of(row, column)) for column in self.input_columns(list(row)))

    def encode(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Encodes texts as token ids, padded to the longest row and cut at the model's length."""
        texts = [[text_of(row, column) for row in rows] for column in self.input_columns(list(rows[0]))]
        require_padding(processor)
        longest = max_length(processor, model)
        encoded = dict(processor(*texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"))
        refuse_nothing(encoded, rows)
        labels = class_labels(rows, model)
        if labels is not None:
            encoded["labels"] = labels
        return encoded
