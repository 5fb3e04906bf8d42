"""What classification of anything has in common: cross-entropy and accuracy."""

from torch import Tensor
from torch.nn import functional as F

from hf_lossless.tasks.base import Task
from hf_lossless.tasks.metrics import Accuracy


class Classification(Task):
    """One label for each example."""

    metric_name = "accuracy"

    def predict(self, logits: Tensor) -> Tensor:
        """The most likely class."""
        return logits.argmax(-1)

    def example_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each example, in nats."""
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def example_scores(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """1 where the prediction is right, 0 where not."""
        return (predictions == labels).float()

    def metric(self, predictions: Tensor, labels: Tensor) -> float:
        """Share of right predictions."""
        result = Accuracy().compute(predictions=predictions.tolist(), references=labels.tolist())
        return float(result["accuracy"])
