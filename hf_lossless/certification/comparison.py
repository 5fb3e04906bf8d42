"""Compares two models on the same rows: loss, metric, flips, and the divergence of their outputs.

The rows are the same, so differences are paired: a row's difficulty affects both models and cancels. An equal loss can
hide a changed model; hence the flips (rows whose prediction changed) and the mean divergence

    KL(original || compressed) = mean over rows of  sum_k p_k (log p_k - log q_k),    p, q = softmax of the logits
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lossless.errors import CalibrationError, DataError


@dataclass(frozen=True, eq=False)
class Outputs:
    """A model's losses, scores, predictions and logits on some rows.

    Attributes:
        losses: Loss of each row [rows].
        scores: The task's metric of each row [rows], between 0 and 1: correctness, exact match, F1.
        predictions: The answer to each row: a class, a text, or tokens; compared by equality.
        logits: Logits behind the predictions [rows, ..., classes]; None where the task has none of that form.

    Raises:
        DataError: Lengths differ, there are fewer than two rows, or a score is undefined or not between 0 and 1.
        CalibrationError: A loss is not finite.
    """

    losses: Tensor
    scores: Tensor
    predictions: Sequence[Any]
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = {
            name: len(value)
            for name in ("losses", "scores", "predictions", "logits")
            if (value := getattr(self, name)) is not None
        }
        if len(set(lengths.values())) != 1 or self.losses.ndim != 1 or self.scores.ndim != 1:
            shapes = ", ".join(
                f"{name} {list(getattr(getattr(self, name), 'shape', [length]))}" for name, length in lengths.items()
            )
            raise DataError(f"the outputs are not of the same rows: {shapes}. Give one loss and one score for each.")
        if self.num_rows < 2:
            raise DataError(f"{self.num_rows} row(s) cannot show how far rows differ. Give at least two.")
        broken = torch.nonzero(~self.losses.isfinite()).flatten().tolist()
        if broken:
            raise CalibrationError(
                f"the loss is {self.losses[broken[0]].item()} on row {broken[0]} and not finite on {len(broken)} of "
                f"{self.num_rows} rows. Check the model's weights and its dtype (float16 overflows where bfloat16 does "
                "not)."
            )
        wrong = torch.nonzero(~((self.scores >= 0) & (self.scores <= 1))).flatten().tolist()
        if wrong:
            raise DataError(
                f"the metric is {self.scores[wrong[0]].item()} on row {wrong[0]}, and undefined or not between 0 and 1 "
                f"on {len(wrong)} of {self.num_rows} rows. Leave out rows on which it is undefined, or take another."
            )

    @property
    def num_rows(self) -> int:
        """Returns the number of rows."""
        return len(self.losses)


def refuse_one_class(labels: Sequence[int], metric_name: str) -> None:
    """Raises an error where a metric that needs two classes finds only one.

    Args:
        labels: Labels of the rows.
        metric_name: Name of the metric, for the message.

    Raises:
        DataError: All labels are the same.
    """
    found = sorted(set(labels))
    if len(found) < 2:
        raise DataError(
            f"{metric_name} needs rows of two classes or more, and all {len(labels)} labels are {found}. Give rows of "
            "several classes, or take a metric that one class is enough for, say accuracy."
        )


@dataclass(frozen=True)
class Comparison:
    """The comparison of two models on the same rows.

    Attributes:
        num_rows: Number of rows.
        original_loss: Mean loss of the original.
        compressed_loss: Mean loss of the compressed model.
        loss_change: Loss of the compressed model minus that of the original.
        loss_change_error: Standard error of `loss_change`, from paired differences.
        original_metric: Mean score of the original.
        compressed_metric: Mean score of the compressed model.
        flips: Rows whose prediction changed.
        right_to_wrong: Flips whose score fell.
        wrong_to_right: Flips whose score rose.
        mean_kl: Mean KL(original || compressed) in nats; None without logits.
    """

    num_rows: int
    original_loss: float
    compressed_loss: float
    loss_change: float
    loss_change_error: float
    original_metric: float
    compressed_metric: float
    flips: int
    right_to_wrong: int
    wrong_to_right: int
    mean_kl: float | None


def compare(original: Outputs, compressed: Outputs) -> Comparison:
    """Compares two models' outputs on the same rows.

    Args:
        original: Outputs of the original.
        compressed: Outputs of the compressed model on the same rows, in the same order.

    Raises:
        DataError: The outputs are not of the same rows.
        CalibrationError: The divergence is not finite.

    Example:
        >>> right = Outputs(torch.zeros(3), scores=torch.ones(3), predictions=[1, 1, 0])
        >>> worse = Outputs(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([1.0, 0.0, 1.0]), predictions=[1, 0, 0])
        >>> compare(right, worse).loss_change, compare(right, worse).right_to_wrong
        (1.0, 1)
    """
    if original.num_rows != compressed.num_rows:
        raise DataError(
            f"the original's predictions are {original.num_rows}, the compressed model's {compressed.num_rows}. Run "
            "both on the same rows."
        )
    difference = compressed.losses.double() - original.losses.double()
    flipped = torch.tensor(
        [one != other for one, other in zip(original.predictions, compressed.predictions, strict=True)]
    )
    return Comparison(
        num_rows=original.num_rows,
        original_loss=original.losses.double().mean().item(),
        compressed_loss=compressed.losses.double().mean().item(),
        loss_change=difference.mean().item(),
        loss_change_error=difference.std().item() / math.sqrt(original.num_rows),
        original_metric=original.scores.double().mean().item(),
        compressed_metric=compressed.scores.double().mean().item(),
        flips=int(flipped.sum()),
        right_to_wrong=int((flipped & (compressed.scores < original.scores)).sum()),
        wrong_to_right=int((flipped & (compressed.scores > original.scores)).sum()),
        mean_kl=_mean_kl(original.logits, compressed.logits),
    )


def _mean_kl(original: Tensor | None, compressed: Tensor | None) -> float | None:
    if original is None or compressed is None:
        return None
    log_p, log_q = original.double().log_softmax(-1), compressed.double().log_softmax(-1)
    # A masked class has p = 0 and log p = -inf; its term is 0.
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    divergence = terms.sum().item() / len(original)
    if not math.isfinite(divergence):
        raise CalibrationError(
            f"the divergence from the original's outputs is {divergence}: a logit is not finite. Check the compressed "
            "model's weights."
        )
    return max(divergence, 0.0)
