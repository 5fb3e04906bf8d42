"""What tests of saving and loading look at."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from tiny_models import TinyModel
from torch import Tensor


@dataclass(frozen=True)
class RoundTrip:
    """A model as compressed, the folder it was saved to, and the model that this folder gives."""

    tiny: TinyModel
    original: Path
    model: hf.PreTrainedModel
    folder: Path
    again: hf.PreTrainedModel
    loading_info: dict
    dtype: torch.dtype

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.tiny.inputs(dtype=self.dtype)

    @property
    def plan(self):
        return self.again.config.quantization_config.plan
