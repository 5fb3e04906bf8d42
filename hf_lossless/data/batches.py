"""The loss of a batch: what every theory differentiates or measures.

A batch is either what a Hugging Face model takes as keyword arguments, with "labels" in it, or a pair
`(inputs, targets)` for any other module. The loss is what the model returns, a mean over the batch. Batches are weighed
by their rows; a language model's loss is a mean over tokens, and tokens of short batches then count for more.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.errors import CalibrationError, DataError

Batch = Any
"""A mapping of keyword arguments, or a pair (inputs, targets); see `batch_loss`. A caller's own loss may take any tuple
of tensors, or one tensor."""

LossFunction = Callable[[nn.Module, Batch], Tensor]
"""Mean loss of a model on one batch, a scalar."""


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Computes the mean loss of a batch: the model's own where it is given labels, cross-entropy for a pair.

    Raises:
        DataError: The batch has another form.
        CalibrationError: The model returns no loss.
    """
    if isinstance(batch, Mapping):
        return loss_of_outputs(model, model(**batch), batch)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return _cross_entropy(model, *batch)
    raise DataError(
        f"a batch is a mapping of the model's arguments or a pair (inputs, targets), got {type(batch).__name__}. "
        "Give batches of one of these forms, or pass loss= to compress()."
    )


def loss_of_outputs(model: nn.Module, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """Reads the mean loss of a batch, a scalar, from the model's outputs, or computes it from their scores.

    Args:
        model: The model.
        outputs: What the model returned for the batch.
        batch: The keyword arguments that the model was called with.

    Raises:
        CalibrationError: The outputs hold no loss, nor scores to compute it from.
    """
    loss: Tensor | None = getattr(outputs, "loss", None)
    if loss is None:
        loss = _loss_of_classes(outputs, batch.get("labels"))
    if loss is None:
        raise CalibrationError(
            f"{type(model).__name__} returned no loss for a batch with the keys {sorted(batch)}. "
            'Add "labels" to the batches, load the model with a task head, or pass loss= to compress().'
        )
    return _in_float32(loss, outputs, batch.get("labels"))


def _cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    outputs = model(inputs)
    classes = isinstance(outputs, Tensor) and outputs.ndim > 1 and outputs.shape[1] > 1
    if not classes or targets.is_floating_point():
        got = f"outputs {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise DataError(
            f"a pair (inputs, targets) is judged by cross-entropy, which needs scores [examples, classes] and whole "
            f"numbers as targets; {type(model).__name__} gave {got} for targets of {targets.dtype}. "
            "Pass the loss that the model was trained with as loss=."
        )
    return F.cross_entropy(outputs.float(), targets)


def _loss_of_classes(outputs: Any, labels: Any) -> Tensor | None:
    """Computes the cross-entropy of a classifier that returns scores and no loss; None for other models.

    DeiT with a teacher is such a classifier.
    """
    scores = getattr(outputs, "logits", None)
    if isinstance(scores, Tensor) and scores.ndim == 2 and scores.shape[1] > 1:
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            return F.cross_entropy(scores.float(), labels)
    return None


def _in_float32(loss: Tensor, outputs: Any, labels: Any) -> Tensor:
    """Recomputes a classifier's half-precision loss from its scores in float32; bfloat16 has steps of 0.004 near 1.

    Only a loss that equals this cross-entropy to within such steps is replaced. Transformers already computes the
    losses of language models in float32.
    """
    scores = getattr(outputs, "logits", None)
    half = loss.dtype in (torch.float16, torch.bfloat16)
    if half and isinstance(scores, Tensor) and scores.ndim == 2 and isinstance(labels, Tensor) and labels.ndim == 1:
        if scores.shape[1] > 1 and not labels.is_floating_point():
            precise = F.cross_entropy(scores.float(), labels)
            return precise if torch.isclose(precise, loss.float(), rtol=0.02, atol=0.01) else loss
    return loss


def num_examples(batch: Batch) -> int:
    """Returns the number of examples in a batch: the first dimension of its first tensor.

    Raises:
        DataError: There is no such tensor.
    """
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    for value in batch if isinstance(batch, tuple | list) else (batch,):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise DataError("a calibration batch holds no tensor with a batch dimension. Give tensors [examples, ...].")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves the tensors of a batch to `device`."""
    if isinstance(batch, Mapping):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(value.to(device) if isinstance(value, Tensor) else value for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def model_device(model: nn.Module) -> torch.device:
    """Returns the device on which a model takes its inputs: that of its first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
