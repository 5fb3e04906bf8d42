"""What tests of saving and loading look at."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from tiny_models import TinyModel
from torch import Tensor

ROUNDING = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Largest difference of two models' outputs by rounding alone, as a share of the largest output: tensors that lie at
other addresses, as in a file that is mapped into memory, torch may add up in another order."""


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


def outputs_of(model: hf.PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """A model's scores, or the last hidden state of a base model."""
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def assert_same_model(found: hf.PreTrainedModel, expected: hf.PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Two models hold the same tensors, bit for bit, and compute the same to within rounding."""
    tensors, wanted = found.state_dict(), expected.state_dict()
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name
    assert_same_outputs(outputs_of(found, inputs), outputs_of(expected, inputs))


def assert_same_outputs(found: Tensor, expected: Tensor) -> None:
    """Outputs of several rows are the same to within rounding, and not nearly the same for all rows."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    found, expected, share = found.double(), expected.double(), ROUNDING[found.dtype]
    bound = share * expected.abs().max()
    assert (expected - expected.mean(0)).abs().max() > 2 * bound, "these outputs would not tell two models apart"
    difference = (found - expected).abs().max()
    assert difference <= bound, f"outputs differ by {difference:.3g}, more than {bound:.3g}"
