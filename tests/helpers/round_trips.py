"""What tests of saving and loading look at: models as compressed and as loaded, made once, and whether they agree."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from tiny_models import TINY_MODELS, TinyModel
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


class RoundTrips:
    """Makes round trips, each of them once. Tests must leave their models as they are."""

    def __init__(self, root: Path, compressed: Callable[..., hf.PreTrainedModel], setting: str) -> None:
        """Remembers how.

        Args:
            root: An empty folder.
            compressed: Of a tiny model, the folder with its original, a setting and a dtype.
            setting: The one that is meant where none is named.
        """
        self._root, self._compressed, self._setting = root, compressed, setting
        self._made: dict[tuple[str, str, torch.dtype], RoundTrip] = {}

    def __call__(self, name: str, setting: str | None = None, dtype: torch.dtype = torch.float32) -> RoundTrip:
        setting = setting or self._setting
        if (name, setting, dtype) not in self._made:
            tiny, place = TINY_MODELS[name], self._root / f"{name}-{setting}-{dtype}"
            original, folder = place / "original", place / "compressed"
            tiny.build().to(dtype).save_pretrained(original)
            model = self._compressed(tiny, original, setting, dtype)
            model.save_pretrained(folder)
            again, info = tiny.auto_class.from_pretrained(folder, output_loading_info=True)
            self._made[name, setting, dtype] = RoundTrip(tiny, original, model, folder, again, info, dtype)
        return self._made[name, setting, dtype]


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
