"""What choosing one class has in common, of texts, images or endings: cross-entropy and accuracy."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_lossless.data.tasks.base import RowAnswers, Task, run
from hf_lossless.data.tasks.columns import LABEL_COLUMNS, Row
from hf_lossless.data.tasks.metrics import Accuracy


class Classification(Task):
    """One class for each row."""

    metric_name = "accuracy"
    target_columns = LABEL_COLUMNS

    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """A batch of the model's arguments, with "labels" where the rows have them.

        Raises:
            DataError: The rows hold what the model cannot use, or a label is not one of the model's.
        """

    def batches(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> Iterable[dict[str, Tensor]]:
        """One batch of the rows."""
        yield self.encode(rows, processor, model)

    def own_targets(self, batch: Mapping[str, Tensor], outputs: Any) -> dict[str, Tensor]:
        """The most likely classes."""
        return {"labels": self.predict(outputs.logits)}

    def answer(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> RowAnswers:
        """The most likely class of each row, and the logits."""
        batch = self.encode(rows, processor, model)
        labels = batch.pop("labels")
        logits = run(model, batch).logits.cpu()
        predictions = self.predict(logits)
        scores = self.example_scores(predictions, labels)
        losses = self.example_losses(logits, labels)
        return RowAnswers(losses, scores, predictions.tolist(), labels.tolist(), logits)

    def metrics(self, answers: RowAnswers) -> dict[str, float]:
        """Accuracy."""
        return Accuracy().of(answers.predictions, answers.references)

    def predict(self, logits: Tensor) -> Tensor:
        """The most likely class."""
        return logits.argmax(-1)

    def example_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each example, in nats; their mean is the loss that the model returns."""
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def example_scores(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """1 where the prediction is right, 0 where not."""
        return (predictions == labels).float()
