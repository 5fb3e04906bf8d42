"""The metrics of all tasks, computed in memory: accuracies, perplexity, and exact match and F1 of answers.

Exact match and F1 are those of the official evaluation scripts of SQuAD v1.1 and v2.0.

An answer is first normalised: lower case, no ASCII punctuation, no articles (a, an, the), single blanks. Then

    exact match = 1 where the texts are equal,    F1 = 2 p r / (p + r)

with p and r the shares of the prediction's words and of the gold answer's words that both have, counted with
multiplicity. Of several gold answers the best counts. The two scripts differ where an answer is empty after
normalisation: v1.1 gives F1 = 0, for no word is in common; v2.0, where the empty answer says that there is none, gives
1 if both are empty and 0 otherwise, leaves out gold answers that are empty then, and takes the empty text where none
remains.

Values are between 0 and 1; the scripts print them times 100. Sources: P. Rajpurkar et al., "SQuAD: 100,000+ questions
for machine comprehension of text", arXiv 1606.05250, section 6.1, and P. Rajpurkar, R. Jia & P. Liang, "Know what you
don't know", arXiv 1806.03822.
"""

import math
import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score


class RowMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric of one prediction and one reference for each row.

    Attributes:
        summary: One sentence on what the metric computes.
        types: Feature types of a row's "predictions" and "references".
    """

    summary: ClassVar[str]
    types: ClassVar[Mapping[str, Any]]

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)  # else it writes a file into the user's cache for every computation

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.summary, citation="", features=datasets.Features(dict(self.types)))

    @abstractmethod
    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        """Computes the metric's values by name."""

    def of(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Computes the metric's values by name, as plain floats."""
        found = self.compute(predictions=predictions, references=references)
        return {name: float(value) for name, value in found.items()}


class Accuracy(RowMetric):
    """Share of predictions that equal their reference.

    Example:
        >>> Accuracy().of([0, 1, 1], [0, 1, 0])["accuracy"]
        0.6666666666666666
    """

    summary = "Share of predictions that equal their reference."
    types = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}  # noqa: RUF012

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class TopAccuracy(RowMetric):
    """Share of rows whose reference is among the k predicted classes of the row.

    Example:
        >>> TopAccuracy().of([[3, 1], [2, 0]], [1, 1])
        {'top_2_accuracy': 0.5}
    """

    summary = "Share of rows whose reference is among the classes that were predicted as the best k."
    types = {  # noqa: RUF012
        "predictions": datasets.List(datasets.Value("int64")),
        "references": datasets.Value("int64"),
    }

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        found = [reference in best for best, reference in zip(predictions, references, strict=True)]
        return {f"top_{len(predictions[0])}_accuracy": sum(found) / len(found)}


class Perplexity(RowMetric):
    """exp(mean loss of a token), from the mean loss of each row's tokens (predictions) and their number (references).

    Infinite where it overflows float64, from a loss of about 710 nats.

    Example:
        >>> round(Perplexity().of([math.log(8), math.log(2)], [1, 3])["perplexity"], 4)  # (8 * 2 * 2 * 2) ** (1 / 4)
        2.8284
    """

    summary = "Exponential of the mean loss of a token."
    types = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}  # noqa: RUF012

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        loss = float(np.average(predictions, weights=references))
        return {"perplexity": math.exp(loss) if loss < math.log(np.finfo(np.float64).max) else math.inf}


class TokenAccuracy(RowMetric):
    """Share of tokens that are predicted correctly, averaged over rows with equal weight.

    Example:
        >>> TokenAccuracy().of([[1, 2], [5]], [[1, 3], [5]])
        {'token_accuracy': 0.75}
    """

    summary = "Mean over rows of the share of tokens that are predicted correctly."
    types = {  # noqa: RUF012
        "predictions": datasets.List(datasets.Value("int64")),
        "references": datasets.List(datasets.Value("int64")),
    }

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        rows = [np.equal(predicted, tokens).mean() for predicted, tokens in zip(predictions, references, strict=True)]
        return {"token_accuracy": float(np.mean(rows))}


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Normalises an answer for comparison.

    Example:
        >>> normalised("The  U.S.' 'a' team")
        'us team'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str], unanswerable: bool = False) -> float:
    """Returns 1 where a prediction equals one of the gold answers, 0 elsewhere.

    Args:
        prediction: The predicted answer; empty: "there is no answer".
        answers: Gold answers.
        unanswerable: Whether the rules of v2.0 hold, where a question may have no answer; else those of v1.1.
    """
    return float(any(normalised(prediction) == normalised(answer) for answer in _gold(answers, unanswerable)))


def f1(prediction: str, answers: Sequence[str], unanswerable: bool = False) -> float:
    """Computes the word F1 of a prediction against the gold answer it fits best; arguments as in `exact_match`.

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
    """Means of F1 and exact match over questions that may have no answer (v2.0); the empty text predicts "no answer".

    Example:
        >>> SquadV2().of(["", "Paris"], [[], []])
        {'f1': 0.5, 'exact_match': 0.5}
    """

    unanswerable = True
