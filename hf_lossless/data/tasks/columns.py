"""Finds the columns of a data set by their usual names, and checks the types of their values."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_lossless.errors import DataError

Row = Mapping[str, Any]

ROW_NUMBER = "__row__"
"""The key of a row's number in the user's data set, for messages."""

ID_COLUMN = "id"

LABEL_COLUMNS = ("label", "labels", "fine_label")
ANSWER_COLUMNS = ("answers",)
CHOICE_COLUMNS = ("label", "labels", "answer")

TARGET_COLUMNS = tuple(dict.fromkeys((*LABEL_COLUMNS, *ANSWER_COLUMNS, *CHOICE_COLUMNS)))
"""Every name of a column that holds correct answers and not a model's inputs."""


def find_column(names: Sequence[str], known: Sequence[str], what: str) -> str:
    """Finds the first of the known columns that a data set has.

    Args:
        names: Columns that the data set has.
        known: Usual names of such a column.
        what: The column's content, for the message.

    Raises:
        DataError: The data set has none of them; the message lists the names sought and found.
    """
    for name in known:
        if name in names:
            return name
    raise DataError(
        f"the rows have no {what} column: looked for {', '.join(known)}, found {', '.join(names) or 'none'}. {_RENAME}"
    )


def require_columns(names: Sequence[str], needed: Sequence[str], task_name: str) -> None:
    """Raises an error where a data set lacks columns of its task.

    Raises:
        DataError: A column is missing; the message lists the missing columns and those found.
    """
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(
            f"the rows lack the column{'s' if len(missing) > 1 else ''} {', '.join(missing)} of the task {task_name}: "
            f"found {', '.join(names) or 'none'}. {_RENAME}"
        )


_RENAME = "Rename a column, or name the right task with task= (--task)."


def name_of(row: Row) -> str:
    """Makes the name of a row for messages.

    Example:
        >>> name_of({ROW_NUMBER: 17, "id": "56be"})
        "row 17 (id '56be')"
    """
    number = row.get(ROW_NUMBER)
    named = f" (id {row[ID_COLUMN]!r})" if ID_COLUMN in row else ""
    return f"row {number}{named}" if number is not None else f"a row{named}"


def text_of(row: Row, column: str) -> str:
    """Returns the text in a column of a row.

    Raises:
        DataError: The column holds something else than text.
    """
    value = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"the column {column!r} holds {value!r} ({type(value).__name__}) where text is expected, in "
            f"{name_of(row)}. Clean these rows, or name the right task with task= (--task)."
        )
    return value


def shortened(text: str, longest: int = 60) -> str:
    """Shortens a text for a message, and quotes it.

    Example:
        >>> shortened("word " * 20, 9)
        "'word word...'"
    """
    return repr(text if len(text) <= longest else f"{text[:longest]}...")
