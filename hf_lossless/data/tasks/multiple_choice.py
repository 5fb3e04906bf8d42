"""Multiple choice: SWAG, HellaSwag, RACE. Each choice is a text of its own, and the classes are the choices.

Data sets have beginnings and endings in three forms:

| form      | columns                                   | beginning         | ending of choice i | right one       |
|-----------|-------------------------------------------|-------------------|--------------------|-----------------|
| SWAG      | sent1, sent2, ending0, ending1, ..; label | sent1             | sent2 + ending i   | number          |
| HellaSwag | ctx, endings; label                       | ctx               | ending i           | number, as text |
| RACE      | article, question, options; answer        | article           | question + option i| letter          |
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMultipleChoice, PreTrainedModel

from hf_lossless.data.tasks.classification import Classification
from hf_lossless.data.tasks.columns import CHOICE_COLUMNS, Row, name_of, require_columns, text_of
from hf_lossless.data.tasks.tokenization import load_tokenizer, max_length, refuse_nothing, require_padding
from hf_lossless.errors import DataError

_NUMBERED = re.compile(r"ending\d+")


@dataclass(frozen=True)
class Choices:
    """The beginning, the endings and the label of one row.

    Attributes:
        beginning: The text that all choices share.
        endings: One ending for each choice.
        label: Index of the correct choice; None where the row has none.
    """

    beginning: str
    endings: tuple[str, ...]
    label: int | None


def choice_columns(names: Sequence[str], task_name: str) -> tuple[str, ...]:
    """Finds the columns of beginnings and endings.

    Raises:
        DataError: The names fit no form; the message lists the missing columns of SWAG's form.
    """
    for form in (("ctx", "endings"), ("article", "question", "options")):
        if all(name in names for name in form):
            return form
    endings = sorted((name for name in names if _NUMBERED.fullmatch(name)), key=lambda name: int(name[len("ending") :]))
    require_columns(names, ("sent1", "sent2", *(endings if len(endings) > 1 else ("ending0", "ending1"))), task_name)
    return ("sent1", "sent2", *endings)


def choices_of(row: Row, columns: Sequence[str]) -> Choices:
    """Reads the choices of a row.

    Args:
        row: A row in any of the forms.
        columns: The columns that `choice_columns` found.

    Raises:
        DataError: A value is no text, there are fewer than two choices, or the label is none of the choices.
    """
    if columns[0] == "sent1":
        beginning, prefix = text_of(row, "sent1"), text_of(row, "sent2")
        endings = [text_of(row, column) for column in columns[2:]]
    elif columns[0] == "ctx":
        beginning, prefix, endings = text_of(row, "ctx"), "", _texts(row, "endings")
    else:
        beginning, prefix = text_of(row, "article"), text_of(row, "question")
        endings = _texts(row, "options")
    return Choices(beginning, tuple(f"{prefix} {ending}".strip() for ending in endings), _label(row, len(endings)))


def _texts(row: Row, column: str) -> list[str]:
    texts = row[column]
    if not isinstance(texts, list | tuple) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"the column {column!r} holds {texts!r} where two texts or more are expected, in {name_of(row)}. "
            "Clean these rows, or name the right task with task= (--task)."
        )
    return list(texts)


def _label(row: Row, num_choices: int) -> int | None:
    column = next((name for name in CHOICE_COLUMNS if name in row), None)
    if column is None:
        return None
    given = row[column]
    label: Any = given
    if isinstance(given, str) and given.isdecimal():
        label = int(given)
    elif isinstance(given, str) and len(given) == 1:
        label = ord(given.upper()) - ord("A")
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < num_choices:
        return label
    raise DataError(
        f"the label {given!r} in column {column!r} is none of the {num_choices} choices (0 to {num_choices - 1}, or "
        f"A to {chr(ord('A') + num_choices - 1)}), in {name_of(row)}. Take a split with labels, or drop the row."
    )


class MultipleChoice(Classification):
    """The task of choosing the correct ending of a beginning."""

    name = "multiple-choice"
    heads = ("ForMultipleChoice",)
    auto_class = AutoModelForMultipleChoice
    target_columns = CHOICE_COLUMNS

    def load_processor(self, model: str) -> Any:
        """Loads the model's tokenizer.

        Raises:
            ConfigurationError: The model has no tokenizer.
        """
        return load_tokenizer(model)

    def input_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Finds the columns of beginnings and endings."""
        return choice_columns(names, self.name)

    def length(self, row: Row) -> int:
        """Counts the characters of the beginning and the longest ending."""
        choices = choices_of(row, self.input_columns(list(row)))
        return len(choices.beginning) + max(map(len, choices.endings))

    def encode(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Encodes rows as token ids [rows, choices, tokens], padded to the longest and cut at the model's length."""
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
