"""What tasks ask of a data set's rows: columns by the names that data sets call them, and values of the right type."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_lossless.errors import DataError

Row = Mapping[str, Any]

ROW_NUMBER = "__row__"
"""Under this key a row carries its number in the user's data set, for messages."""

ID_COLUMN = "id"

LABEL_COLUMNS = ("label", "labels", "fine_label")
ANSWER_COLUMNS = ("answers",)
CHOICE_COLUMNS = ("label", "labels", "answer")

TARGET_COLUMNS = tuple(dict.fromkeys((*LABEL_COLUMNS, *ANSWER_COLUMNS, *CHOICE_COLUMNS)))
"""Every column that holds what is right, and not what a model sees."""


def find_column(names: Sequence[str], known: Sequence[str], what: str) -> str:
    """The first of the known columns that a data set has.

    Args:
        names: Columns that the data set has.
        known: What such a column is called.
        what: What it holds, for the message.

    Raises:
        DataError: It has none; the message lists what was looked for and what was found.
    """
    for name in known:
        if name in names:
            return name
    raise DataError(
        f"the rows have no {what} column: looked for {', '.join(known)}, found {', '.join(names) or 'none'}. {_RENAME}"
    )


def require_columns(names: Sequence[str], needed: Sequence[str], task_name: str) -> None:
    """Ends with an error where a data set lacks columns of its task.

    Raises:
        DataError: The message lists the columns that are missing, and those that were found.
    """
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(
            f"the rows lack the column{'s' if len(missing) > 1 else ''} {', '.join(missing)} of the task {task_name}: "
            f"found {', '.join(names) or 'none'}. {_RENAME}"
        )


_RENAME = "Rename a column, or name the right task with task= (--task)."


def name_of(row: Row) -> str:
    """What a message calls a row.

    Example:
        >>> name_of({ROW_NUMBER: 17, "id": "56be"})
        "row 17 (id '56be')"
    """
    number = row.get(ROW_NUMBER)
    named = f" (id {row[ID_COLUMN]!r})" if ID_COLUMN in row else ""
    return f"row {number}{named}" if number is not None else f"a row{named}"


def text_of(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        DataError: It holds something else.
    """
    value = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"the column {column!r} holds {value!r} ({type(value).__name__}) where text is expected, in "
            f"{name_of(row)}. Clean these rows, or name the right task with task= (--task)."
        )
    return value


def shortened(text: str, longest: int = 60) -> str:
    """A text for a message, in quotes.

    Example:
        >>> shortened("word " * 20, 9)
        "'word word...'"
    """
    return repr(text if len(text) <= longest else f"{text[:longest]}...")
