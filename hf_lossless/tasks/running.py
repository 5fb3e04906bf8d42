"""A forward pass on the model's own device, without gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def run(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Any:
    """The model's outputs for a batch."""
    with torch.no_grad():
        return model(**{name: value.to(model.device) for name, value in batch.items()})
