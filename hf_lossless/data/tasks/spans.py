"""Answers as spans of a context: the tokens that an answer covers, and the spans with the best scores.

A context longer than the model takes comes in strides that overlap. For each stride we have the model's start and end
scores [tokens], and the characters of the context that each token covers, or None for tokens outside of the context
(question, special tokens, padding).

A span (i, j) with i <= j scores start_i + end_j. As in the official script of transformers only the `N_BEST` highest
starts and ends are combined, and an answer is at most `MAX_ANSWER_TOKENS` long; unlike there the `N_BEST` are chosen
among the context's tokens alone, so that a best start and end always exist.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lossless.data.tasks.columns import Row, name_of, shortened, text_of
from hf_lossless.errors import DataError

CONTEXT, QUESTION, ANSWERS = "context", "question", "answers"


@dataclass(frozen=True)
class Question:
    """A question with its context and gold answers, read from one row.

    Attributes:
        name: The row's name in messages.
        question: The question without surrounding blanks; some of SQuAD's have thousands.
        context: The passage.
        answers: Texts of the gold answers; none where the question has no answer (SQuAD v2).
        start: Index of the first gold answer's first character; None where there is no answer.
    """

    name: str
    question: str
    context: str
    answers: tuple[str, ...]
    start: int | None

    @property
    def end(self) -> int | None:
        """Returns the index behind the first gold answer's last character; None where there is no answer."""
        return None if self.start is None else self.start + len(self.answers[0])


def question_of(row: Row) -> Question:
    """Reads the question of a row; it has no answers where the row has no column of answers.

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
    """Reads text and start of each answer, from a mapping of two lists or from a list of mappings."""
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


N_BEST = 20
MAX_ANSWER_TOKENS = 30

Offsets = Sequence[tuple[int, int] | None]
"""First character of each token and the index behind its last; None for tokens outside of the context."""


@dataclass(frozen=True)
class Span:
    """A span of the context.

    Attributes:
        score: Start score plus end score.
        start: Index of its first character.
        end: Index behind its last character.
    """

    score: float
    start: int
    end: int


def target_tokens(offsets: Offsets, start: int, end: int) -> tuple[int, int] | None:
    """Finds the first and last token of an answer; None where the stride does not hold all of it.

    Args:
        offsets: Offsets of the stride's tokens.
        start: Index of the answer's first character.
        end: Index behind its last character.

    Example:
        >>> target_tokens([None, (0, 3), (4, 9), (9, 10)], start=4, end=9)
        (2, 2)
    """
    context = [(index, *characters) for index, characters in enumerate(offsets) if characters is not None]
    if not context or context[0][1] > start or context[-1][2] < end:
        return None
    first = max(index for index, token_start, _ in context if token_start <= start)
    last = min(index for index, _, token_end in context if token_end >= end)
    return first, max(first, last)


def best_spans(starts: Tensor, ends: Tensor, offsets: Offsets, n_best: int = N_BEST) -> list[Span]:
    """Finds the best spans of one stride, best first: at most `n_best`; none where it holds no context.

    Args:
        starts: Start scores [tokens].
        ends: End scores [tokens].
        offsets: Offsets of the tokens.
        n_best: Number of starts and of ends that are combined, and the most spans returned.

    Example:
        >>> found = best_spans(torch.tensor([9.0, 1.0, 3.0]), torch.tensor([9.0, 5.0, 2.0]), [None, (0, 3), (4, 9)])
        >>> [(span.score, span.start, span.end) for span in found]
        [(6.0, 0, 3), (5.0, 4, 9), (3.0, 0, 9)]
    """
    context = torch.tensor([index for index, characters in enumerate(offsets) if characters is not None])
    if not len(context):
        return []
    count = min(n_best, len(context))
    start_scores, best_starts = starts[context].topk(count)
    end_scores, best_ends = ends[context].topk(count)
    first, last = context[best_starts][:, None], context[best_ends][None, :]
    possible = (first <= last) & (last - first < MAX_ANSWER_TOKENS)
    scores = (start_scores[:, None] + end_scores[None, :]).where(possible, -torch.inf).flatten()
    spans = []
    for score, place in zip(*(values.tolist() for values in scores.topk(min(n_best, len(scores)))), strict=True):
        if score == -torch.inf:
            break
        start, end = offsets[int(first[place // count, 0])], offsets[int(last[0, place % count])]
        assert start is not None and end is not None
        spans.append(Span(score, start[0], end[1]))
    return spans


def best_of_strides(spans_by_stride: Sequence[Sequence[Span]], n_best: int = N_BEST) -> list[Span]:
    """Finds the best spans over all strides of a question, best first."""
    return sorted((span for spans in spans_by_stride for span in spans), key=lambda span: -span.score)[:n_best]


def chosen_answer(context: str, spans: Sequence[Span], null_score: float | None, null_threshold: float) -> str:
    """Returns the text of the best span, or "" where the null answer beats it by more than a threshold.

    Args:
        context: The context of the spans.
        spans: The best spans, best first.
        null_score: Score of the null answer: the least, over the strides, of start plus end score of [CLS]; None where
            every question has an answer.
        null_threshold: By how much the null answer's score must exceed the best span's.
    """
    if not spans:
        return ""
    best = spans[0]
    if null_score is not None and null_score - best.score > null_threshold:
        return ""
    return context[best.start : best.end]
