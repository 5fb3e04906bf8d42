"""What the metrics have in common: computed in memory, and one call from values to numbers."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import datasets
import evaluate


class RowMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric of predictions and references, one of each for every row.

    Attributes:
        summary: What it computes.
        types: Of a row's "predictions" and "references".
    """

    summary: ClassVar[str]
    types: ClassVar[Mapping[str, Any]]

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)  # else it writes a file into the user's cache for every computation

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.summary, citation="", features=datasets.Features(dict(self.types)))

    @abstractmethod
    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        """The metric's values by name."""

    def of(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """The metric's values by name, as plain numbers."""
        found = self.compute(predictions=predictions, references=references)
        return {name: float(value) for name, value in found.items()}
