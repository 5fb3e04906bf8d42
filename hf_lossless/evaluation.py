"""Loss and metric of a model on a task's rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_lossless.calibration.data import load_rows, make_batches
from hf_lossless.calibration.loss import model_device, to_device
from hf_lossless.errors import CalibrationError, DataError
from hf_lossless.tasks.base import LABEL_COLUMNS, Task

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Evaluation:
    """What a model does on some rows.

    Attributes:
        loss: Mean loss per example, in nats for classification.
        metric_name: Name of the task's metric.
        metric: Its value.
        num_examples: Rows.
    """

    loss: float
    metric_name: str
    metric: float
    num_examples: int


def evaluate(model: PreTrainedModel, dataset: Any, task: Task, processor: Any, split: str | None = None) -> Evaluation:
    """Runs a model over labelled rows; one forward pass.

    Args:
        model: Compressed or not; put in evaluation mode.
        dataset: Rows, as `load_rows` takes them; all are used.
        task: The model's task.
        processor: Its tokenizer or image processor.
        split: The split of a DatasetDict or Hub dataset.

    Raises:
        DataError: The rows have no labels, or cannot be used.
        CalibrationError: The loss is not finite.
    """
    rows = load_rows(dataset, split)
    losses, predictions, labels = [], [], []
    device = model_device(model)
    model.eval()  # type: ignore[no-untyped-call]
    batches = make_batches(rows, task, processor, model, _BATCH_SIZE)
    for batch in tqdm(batches, desc="evaluating", total=-(-len(rows) // _BATCH_SIZE)):
        if "labels" not in batch:
            raise DataError(
                f"the rows have no label column: looked for {', '.join(LABEL_COLUMNS)}, found "
                f"{', '.join(rows.column_names)}. Evaluation needs labels: rename a column, or take labelled rows."
            )
        logits = _logits(model, to_device(batch, device))
        losses.append(task.example_losses(logits, batch["labels"]))
        predictions.append(task.predict(logits))
        labels.append(batch["labels"])
    loss = torch.cat(losses).double().mean().item()
    if not math.isfinite(loss):
        raise CalibrationError(
            f"the loss of {type(model).__name__} on these {len(rows)} rows is {loss}. "
            "Check the model's weights and its dtype (float16 overflows where bfloat16 does not)."
        )
    return Evaluation(
        loss=loss,
        metric_name=task.metric_name,
        metric=task.metric(torch.cat(predictions), torch.cat(labels)),
        num_examples=len(rows),
    )


def _logits(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert isinstance(logits, Tensor)
    return logits.cpu()
