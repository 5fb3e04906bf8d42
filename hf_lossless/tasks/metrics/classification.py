"""Accuracy, and whether the right class is among the best few."""

from typing import Any

import datasets
from sklearn.metrics import accuracy_score

from hf_lossless.tasks.metrics.base import RowMetric


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
    """Share of rows whose reference is among the predicted classes, of which each row has the same number.

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
