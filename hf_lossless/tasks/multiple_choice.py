"""Multiple choice: SWAG, HellaSwag, RACE. Each choice is a text of its own, and the classes are the choices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMultipleChoice, PreTrainedModel

from hf_lossless.errors import DataError
from hf_lossless.tasks.choices import choice_columns, choices_of
from hf_lossless.tasks.classification import Classification
from hf_lossless.tasks.rows import CHOICE_COLUMNS, Row, name_of
from hf_lossless.tasks.tokenization import load_tokenizer, max_length, refuse_nothing, require_padding


class MultipleChoice(Classification):
    """A beginning and some endings to the number of the right one."""

    name = "multiple-choice"
    heads = ("ForMultipleChoice",)
    auto_class = AutoModelForMultipleChoice
    target_columns = CHOICE_COLUMNS

    def load_processor(self, model: str) -> Any:
        """Its tokenizer.

        Raises:
            ConfigurationError: There is none.
        """
        return load_tokenizer(model)

    def input_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Beginning and endings."""
        return choice_columns(names, self.name)

    def length(self, row: Row) -> int:
        """Characters of the beginning and the longest ending."""
        choices = choices_of(row, self.input_columns(list(row)))
        return len(choices.beginning) + max(map(len, choices.endings))

    def encode(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Token ids [rows, choices, tokens], padded to the longest and cut at the model's length."""
        require_padding(processor)
        columns = self.input_columns(list(rows[0]))
        found = [choices_of(row, columns) for row in rows]
        num_choices = len(found[0].endings)
        for row, one in zip(rows, found, strict=True):
            if len(one.endings) != num_choices:
                raise DataError(
                    f"{name_of(row)} has {len(one.endings)} choices, {name_of(rows[0])} has {num_choices}. Give rows "
                    "that all have the same number."
                )
        beginnings = [one.beginning for one in found for _ in one.endings]
        endings = [ending for one in found for ending in one.endings]
        longest = max_length(processor, model)
        batch = processor(beginnings, endings, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        encoded = {name: value.unflatten(0, (len(rows), num_choices)) for name, value in batch.items()}
        refuse_nothing(encoded, rows)
        labels = [one.label for one in found if one.label is not None]
        if labels:
            encoded["labels"] = torch.tensor(labels)
        return encoded
