"""Extractive question answering: SQuAD v1.1 and v2, the answer as a span of its context.

**From a row to features.** A row is a question; a context that exceeds the model's length is cut into several features,
which overlap by a third: each has at most `LONGEST` tokens (384 and 128, the official scripts' settings), or fewer
where tokenizer or model allow fewer. The targets of a feature are the first and last token of the first gold answer;
where the feature does not hold all of it, or the question has none, both are [CLS].

**From features back to one number a row.**

    loss        mean over the row's features of (cross-entropy of the start + that of the end) / 2, padding left out:
                the model's own loss without padding, so that a row's loss does not depend on its neighbours
    prediction  the text of the best span over all features (`spans`), or "" for "no answer"
    score       F1 of that text against all gold answers; a certificate watches its mean. Exact match, reported beside
                it, counts an answer that is a word too long as wrong, and rounding moves ends by a word
    logits      two distributions over the row's places (context tokens and [CLS] of all features): start and end

So a *flip* is an answer whose text changed, and the *KL divergence* of a row is that of its starts plus that of its
ends. The loss is a mean over rows, not over features: a question with a long context counts once.

**Questions without an answer.** A data set in which some row has no answer is judged by the rules of v2: "" is an
answer too, taken where its score (start plus end score of [CLS], the least over the features) exceeds that of the best
span by more than `null_threshold`. Elsewhere the best span is taken, as in v1.1.

**Splits.** SQuAD asks some five questions on a paragraph. All of them go to the same split, so that a model is not
calibrated on the context that it is judged by. Within a split they count as independent rows, which holds only roughly:
questions on one paragraph are hard or easy together.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from hf_lossless.data.tasks.base import RowAnswers, Task, run
from hf_lossless.data.tasks.columns import ANSWER_COLUMNS, Row, require_columns
from hf_lossless.data.tasks.metrics import Squad, SquadV2, f1
from hf_lossless.data.tasks.spans import (
    ANSWERS,
    CONTEXT,
    QUESTION,
    Offsets,
    Question,
    best_of_strides,
    best_spans,
    chosen_answer,
    question_of,
    target_tokens,
)
from hf_lossless.data.tasks.tokenization import load_tokenizer, max_length, require_fast, require_padding
from hf_lossless.errors import ConfigurationError, DataError

LONGEST = 384
"""Tokens of a feature, at most: question, stride of the context, special tokens."""


@dataclass(frozen=True, eq=False)
class _Features:
    """The encoded features of some rows.

    Attributes:
        inputs: The model's arguments [features, tokens].
        rows: Index of each feature's row; features of a row stand together.
        offsets: Offsets of each feature's tokens.
        null: Index of each feature's [CLS], the token that stands for "no answer".
    """

    inputs: dict[str, Tensor]
    rows: list[int]
    offsets: list[Offsets]
    null: list[int]

    def targets(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Returns the first and last token of the answer in each feature."""
        spans = []
        for row, offsets, null in zip(self.rows, self.offsets, self.null, strict=True):
            question = questions[row]
            held = None
            if question.start is not None and question.end is not None:
                held = target_tokens(offsets, question.start, question.end)
            spans.append((null, null) if held is None else held)
        starts, ends = zip(*spans, strict=True)
        return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}

    def in_parts(self, size: int, more: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yields the inputs, joined with `more`, `size` features at a time."""
        for start in range(0, len(self.rows), size):
            yield {name: value[start : start + size] for name, value in (self.inputs | dict(more)).items()}


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """The task of finding a question's answer as a span of its context, or that there is none.

    Attributes:
        null_threshold: By how much the score of "no answer" must exceed that of the best span. Model cards of models
            trained on SQuAD v2 give it; 0 is the official script's default.
        unanswerable: Whether some questions have no answer; set by `for_rows`.
    """

    name = "question-answering"
    heads = ("ForQuestionAnswering",)
    auto_class = AutoModelForQuestionAnswering
    metric_name = "f1"
    target_columns = ANSWER_COLUMNS
    split_columns = (CONTEXT,)

    null_threshold: float = 0.0
    unanswerable: bool = False

    def load_processor(self, model: str) -> Any:
        """Loads the model's tokenizer.

        Raises:
            ConfigurationError: The model has no tokenizer.
        """
        return load_tokenizer(model)

    def input_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the columns of context and question."""
        require_columns(names, (CONTEXT, QUESTION), self.name)
        return CONTEXT, QUESTION

    def for_rows(self, rows: datasets.Dataset) -> Self:
        """Returns the task by the rules of SQuAD v2 where a question has no answer, else by those of v1.1."""
        answers = rows[ANSWERS] if ANSWERS in rows.column_names else ()
        return replace(
            self, unanswerable=any(not (one["text"] if isinstance(one, Mapping) else one) for one in answers)
        )

    def length(self, row: Row) -> int:
        """Counts the characters of question and context."""
        return len(row[QUESTION] or "") + len(row[CONTEXT] or "")

    def batches(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> Iterable[dict[str, Tensor]]:
        """Yields as many features at a time as there are rows."""
        questions = [question_of(row) for row in rows]
        features = _features(questions, processor, model)
        yield from features.in_parts(len(rows), features.targets(questions) if ANSWERS in rows[0] else {})

    def own_targets(self, batch: Mapping[str, Tensor], outputs: Any) -> dict[str, Tensor]:
        """Returns the most likely start and end as targets."""
        starts, ends = _scores(outputs, batch)
        return {"start_positions": starts.argmax(-1), "end_positions": ends.argmax(-1)}

    def answer(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> RowAnswers:
        """Finds the best answer to each question."""
        questions = [question_of(row) for row in rows]
        features = _features(questions, processor, model)
        starts, ends = (
            torch.cat(parts)
            for parts in zip(
                *(_scores(run(model, part), part) for part in features.in_parts(len(rows), {})), strict=True
            )
        )
        targets = features.targets(questions)
        losses = (
            F.cross_entropy(starts, targets["start_positions"], reduction="none")
            + F.cross_entropy(ends, targets["end_positions"], reduction="none")
        ) / 2
        of_row = [[index for index, row in enumerate(features.rows) if row == wanted] for wanted in range(len(rows))]
        predictions = [
            self._prediction(question, features, starts, ends, own)
            for question, own in zip(questions, of_row, strict=True)
        ]
        scores = [
            f1(prediction, question.answers or ("",), self.unanswerable)
            for prediction, question in zip(predictions, questions, strict=True)
        ]
        return RowAnswers(
            losses=torch.stack([losses[own].mean() for own in of_row]),
            scores=torch.tensor(scores, dtype=torch.float64),
            predictions=predictions,
            references=[list(question.answers) for question in questions],
            logits=_places(features, starts, ends, of_row),
        )

    def _prediction(
        self, question: Question, features: _Features, starts: Tensor, ends: Tensor, own: Sequence[int]
    ) -> str:
        spans = best_of_strides([best_spans(starts[one], ends[one], features.offsets[one]) for one in own])
        null_score = None
        if self.unanswerable:
            null_score = min((starts[one, features.null[one]] + ends[one, features.null[one]]).item() for one in own)
        return chosen_answer(question.context, spans, null_score, self.null_threshold)

    def metrics(self, answers: RowAnswers) -> dict[str, float]:
        """Computes F1 and exact match, between 0 and 1, by the rules of v1.1 or v2."""
        return (SquadV2() if self.unanswerable else Squad()).of(answers.predictions, answers.references)


def _features(questions: Sequence[Question], tokenizer: Any, model: PreTrainedModel) -> _Features:
    require_padding(tokenizer)
    require_fast(tokenizer, "finding an answer's characters")
    longest = min(max_length(tokenizer, model) or LONGEST, LONGEST)
    stride = longest // 3
    _refuse_long_questions(questions, tokenizer, longest, stride)
    question_first = tokenizer.padding_side == "right"
    pair = [[one.question for one in questions], [one.context for one in questions]]
    encoded = tokenizer(
        *(pair if question_first else reversed(pair)),
        truncation="only_second" if question_first else "only_first",
        max_length=longest,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
        return_tensors="pt",
    )
    rows = encoded.pop("overflow_to_sample_mapping").tolist()
    mapping = encoded.pop("offset_mapping").tolist()
    part = 1 if question_first else 0
    offsets: list[Offsets] = [
        [
            (start, end) if sequence == part else None
            for sequence, (start, end) in zip(encoded.sequence_ids(index), characters, strict=True)
        ]
        for index, characters in enumerate(mapping)
    ]
    first = encoded["attention_mask"].argmax(1).tolist()
    null = [_null_token(*known, tokenizer) for known in zip(encoded["input_ids"].tolist(), first, strict=True)]
    return _Features(dict(encoded), rows, offsets, null)


def _refuse_long_questions(questions: Sequence[Question], tokenizer: Any, longest: int, stride: int) -> None:
    most = longest - stride - 1 - tokenizer.num_special_tokens_to_add(pair=True)
    lengths = map(len, tokenizer([one.question for one in questions], add_special_tokens=False)["input_ids"])
    for question, length in zip(questions, lengths, strict=True):
        if length > most:
            raise DataError(
                f"the question of {question.name} has {length} tokens; of {longest} that fit, {most} are for a "
                "question, so that the strides of its context can overlap. Shorten it, or drop the row."
            )


def _null_token(ids: list[int], first: int, tokenizer: Any) -> int:
    """Finds the token that stands for "no answer": [CLS], or else the first token that is not padding."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else first


def _scores(outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the start and end scores, [features, tokens] in float32, -inf at padding."""
    found = []
    for name in ("start_logits", "end_logits"):
        logits = getattr(outputs, name, None)
        if logits is None:
            raise ConfigurationError(
                f"the model's outputs ({type(outputs).__name__}) have no {name}. Take a model that scores the start "
                "and the end of an answer, say BertForQuestionAnswering."
            )
        logits = logits.float().cpu()
        mask = batch.get("attention_mask")
        found.append(logits if mask is None else logits.masked_fill(mask.cpu() == 0, -torch.inf))
    return found[0], found[1]


def _places(features: _Features, starts: Tensor, ends: Tensor, of_row: Sequence[Sequence[int]]) -> Tensor:
    """Collects the start and end scores [rows, 2, places] at the context's tokens and [CLS] of a row's features."""
    rows = []
    for own in of_row:
        chosen = []
        for one in own:
            context = [place for place, characters in enumerate(features.offsets[one]) if characters is not None]
            chosen.append(torch.stack([starts[one], ends[one]])[:, [features.null[one], *context]])
        rows.append(torch.cat(chosen, dim=1))
    width = max(row.shape[1] for row in rows)
    return torch.stack([F.pad(row, (0, width - row.shape[1]), value=-torch.inf) for row in rows])
