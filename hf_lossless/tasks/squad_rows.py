"""Questions with their contexts and gold answers, as SQuAD's columns hold them, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_lossless.errors import DataError
from hf_lossless.tasks.rows import Row, name_of, shortened, text_of

CONTEXT, QUESTION, ANSWERS = "context", "question", "answers"


@dataclass(frozen=True)
class Question:
    """One row.

    Attributes:
        name: What a message calls it.
        question: Without blanks around it; some of SQuAD's have thousands.
        context: The passage.
        answers: Texts of the gold answers; none where the question has no answer (SQuAD v2).
        start: First character of the first gold answer; None without one.
    """

    name: str
    question: str
    context: str
    answers: tuple[str, ...]
    start: int | None

    @property
    def end(self) -> int | None:
        """The character behind the first gold answer; None without one."""
        return None if self.start is None else self.start + len(self.answers[0])


def question_of(row: Row) -> Question:
    """The question of a row; without a column of answers it has none.

    Raises:
        DataError: Question or context are empty, or an answer does not stand where the row says.
    """
    question, context = text_of(row, QUESTION).strip(), text_of(row, CONTEXT)
    name = f"{name_of(row)}, {shortened(question)}"
    for column, text in ((QUESTION, question), (CONTEXT, context.strip())):
        if not text:
            raise DataError(f"the {column} of {name_of(row)} is empty. Drop rows without a question or a context.")
    answers = _answers(row[ANSWERS], name) if ANSWERS in row else []
    for text, place in answers:
        found = context[place : place + len(text)] if place >= 0 else ""
        if not text or found != text:
            raise DataError(
                f"the answer {shortened(text)} is not in its context at character {place}, where "
                f"{shortened(found)} stands, in {name}. Mend answer_start, or drop the row."
            )
    start = answers[0][1] if answers else None
    return Question(name, question, context, tuple(text for text, _ in answers), start)


def _answers(value: Any, name: str) -> list[tuple[str, int]]:
    """Text and start of each answer, from lists of both or from a list of answers with one of each."""
    try:
        if isinstance(value, Mapping):
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in value]
    except (KeyError, TypeError, ValueError):
        pairs = [(None, None)]
    if not all(isinstance(text, str) and isinstance(start, int) for text, start in pairs):
        raise DataError(
            f"the answers {shortened(str(value))} are not of SQuAD's form, in {name}. Give "
            '{"text": ["..."], "answer_start": [0]}, with empty lists where there is no answer.'
        )
    return pairs
