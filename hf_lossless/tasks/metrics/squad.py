"""Exact match and F1 of answers, as the official evaluation scripts of SQuAD v1.1 and v2.0 compute them.

An answer is first normalised: lower case, no ASCII punctuation, no articles (a, an, the), single blanks. Then

    exact match = 1 where the texts are equal,    F1 = 2 p r / (p + r)

with p and r the shares of the prediction's and of the gold answer's words that they have in common, counted as often as
they come. Of several gold answers the best counts. The two scripts differ where nothing is left of an answer: v1.1
gives F1 = 0, for no word is in common; v2.0, where the empty answer says that there is none, gives 1 if both are empty
and 0 otherwise, leaves out gold answers of which nothing is left, and takes the empty one where none remains.

Values are between 0 and 1; the scripts print them times 100. Sources: P. Rajpurkar et al., "SQuAD: 100,000+ questions
for machine comprehension of text", arXiv 1606.05250, section 6.1, and P. Rajpurkar, R. Jia & P. Liang, "Know what you
don't know", arXiv 1806.03822.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets

from hf_lossless.tasks.metrics.base import RowMetric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """An answer as it is compared.

    Example:
        >>> normalised("The  U.S.' 'a' team")
        'us team'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str], unanswerable: bool = False) -> float:
    """1 where a prediction equals one of the gold answers, 0 elsewhere.

    Args:
        prediction: The predicted answer; empty: there is none.
        answers: Gold answers.
        unanswerable: By the rules of v2.0, where there may be none; otherwise by those of v1.1.
    """
    return float(any(normalised(prediction) == normalised(answer) for answer in _gold(answers, unanswerable)))


def f1(prediction: str, answers: Sequence[str], unanswerable: bool = False) -> float:
    """F1 of the words of a prediction, against the gold answer with which it is best; arguments as in `exact_match`.

    Example:
        >>> f1("in the park", ["a park", "the garden"])
        0.6666666666666666
    """
    return max(_f1(prediction, answer, unanswerable) for answer in _gold(answers, unanswerable))


def _gold(answers: Sequence[str], unanswerable: bool) -> Sequence[str]:
    if not unanswerable:
        return answers
    return [answer for answer in answers if normalised(answer)] or [""]


def _f1(prediction: str, answer: str, unanswerable: bool) -> float:
    predicted, gold = normalised(prediction).split(), normalised(answer).split()
    if unanswerable and not (predicted and gold):
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)


class Squad(RowMetric):
    """Means of F1 and exact match over questions that all have an answer (v1.1).

    Example:
        >>> Squad().of(["Denver Broncos", "in 2016"], [["the Denver Broncos"], ["2016", "February 2016"]])
        {'f1': 0.8333333333333333, 'exact_match': 0.5}
    """

    summary = "F1 and exact match of extracted answers."
    types = {  # noqa: RUF012
        "predictions": datasets.Value("string"),
        "references": datasets.List(datasets.Value("string")),
    }
    unanswerable = False

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            score.__name__: sum(score(prediction, answers, self.unanswerable) for prediction, answers in pairs)
            / len(pairs)
            for score in (f1, exact_match)
        }


class SquadV2(Squad):
    """The same over questions of which some have no answer (v2.0); the empty text says that there is none.

    Example:
        >>> SquadV2().of(["", "Paris"], [[], []])
        {'f1': 0.5, 'exact_match': 0.5}
    """

    unanswerable = True
