"""What every peer is given, what it gives back, and how it says that it cannot."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lossless.data.tasks.base import Task
from hf_lossless.storage.layers import tensor_bytes

Batch = dict[str, Tensor]


class Unavailable(Exception):
    """A peer cannot take the model, or is not installed; the message says why."""


@dataclass(frozen=True)
class PeerProblem:
    """A model to be made smaller, and rows to calibrate on.

    Attributes:
        model: The original, in evaluation mode; peers work on copies.
        batches: Calibration batches: mappings of the model's arguments with "labels".
        task: The model's task, which knows its losses and its metric.
    """

    model: PreTrainedModel
    batches: list[Batch]
    task: Task

    @property
    def original_bytes(self) -> int:
        """Bytes of the original's tensors."""
        return tensor_bytes(self.model)

    @property
    def inputs(self) -> list[Batch]:
        """The calibration batches without their labels."""
        return [inputs_of(batch) for batch in self.batches]

    def copy(self) -> PreTrainedModel:
        """A copy of the model, to be changed."""
        return copy.deepcopy(self.model)


@dataclass(frozen=True)
class PeerModel:
    """A model as a peer made it.

    Attributes:
        logits: Scores [rows, classes] of a batch; labels in the batch are not looked at.
        size_bytes: Bytes of all its tensors as the peer stores them.
        note: What one has to know to read the row.
    """

    logits: Callable[[Batch], Tensor]
    size_bytes: int
    note: str


Method = Callable[[PeerProblem], PeerModel]


def inputs_of(batch: Batch) -> Batch:
    """A batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def logits_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    """The scores that a module of transformers gives to a batch."""

    def logits(batch: Batch) -> Tensor:
        with torch.no_grad():
            return model(**inputs_of(batch)).logits

    return logits


@contextmanager
def package(name: str) -> Iterator[None]:
    """Imports of a peer's package go inside; where it is not installed, the peer is unavailable."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
            raise
        raise Unavailable(f"{name} is not installed: pip install 'hf-lossless[peers]'") from error
