"""Perplexity, and the share of tokens that a language model gets right."""

import math
from typing import Any

import datasets
import numpy as np

from hf_lossless.tasks.metrics.base import RowMetric


class Perplexity(RowMetric):
    """exp(mean loss of a token), from the mean loss of each row's tokens (predictions) and their number (references).

    Infinite where that is no number of float64, from a loss of about 710 nats.

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
    """Share of tokens that are predicted rightly, averaged over rows; each row counts the same.

    Example:
        >>> TokenAccuracy().of([[1, 2], [5]], [[1, 3], [5]])
        {'token_accuracy': 0.75}
    """

    summary = "Mean over rows of the share of tokens that are predicted rightly."
    types = {  # noqa: RUF012
        "predictions": datasets.List(datasets.Value("int64")),
        "references": datasets.List(datasets.Value("int64")),
    }

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        rows = [np.equal(predicted, tokens).mean() for predicted, tokens in zip(predictions, references, strict=True)]
        return {"token_accuracy": float(np.mean(rows))}
