"""The base class of tasks that choose one class for a text, an image or an ending: cross-entropy and accuracy."""

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
    """A task with one class for each row."""

    metric_name = "accuracy"
    target_columns = LABEL_COLUMNS

    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Encodes rows as a batch of the model's arguments, with "labels" where the rows have them.

        Raises:
            DataError: The rows hold values that the model cannot use, or a label is not one of the model's.
        """

    def batches(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> Iterable[dict[str, Tensor]]:
        """Yields one batch of the rows."""
        yield self.encode(rows, processor, model)

    def own_targets(self, batch: Mapping[str, Tensor], outputs: Any) -> dict[str, Tensor]:
        """Returns the most likely classes as labels."""
        return {"labels": self.predict(outputs.logits)}

    def answer(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> RowAnswers:
        """Predicts the most likely class of each row; the answers hold the logits too."""
        batch = self.encode(rows, processor, model)
        labels = batch.pop("labels")
        logits = run(model, batch).logits.cpu()
        predictions = self.predict(logits)
        scores = self.example_scores(predictions, labels)
        losses = self.example_losses(logits, labels)
        return RowAnswers(losses, scores, predictions.tolist(), labels.tolist(), logits)

    def metrics(self, answers: RowAnswers) -> dict[str, float]:
        """Computes the accuracy."""
        return Accuracy().of(answers.predictions, answers.references)

    def predict(self, logits: Tensor) -> Tensor:
        """Returns the most likely class of each row."""
        return logits.argmax(-1)

    def example_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the cross-entropy of each example, in nats; their mean is the loss that the model returns."""
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def example_scores(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Returns the score of each example, [rows]: 1 where the prediction is correct, 0 where not."""
        return (predictions == labels).float()
