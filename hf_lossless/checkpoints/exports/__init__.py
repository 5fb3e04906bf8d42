"""Other formats that a compressed checkpoint can be written in, without this package: `FORMATS`.

Stock transformers loads all but "onnx", which is a graph and no set of tensors: it has a folder of its own.

This file loads none of them, so that a command line can name them at no cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_lossless.checkpoints.exports.convert import Stored
    from hf_lossless.storage.plan import LayerPlan


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        module: Its file in this folder.
        package: What is needed to load it, beside transformers; None: nothing.
    """

    module: str
    package: str | None = None

    @property
    def store(self) -> "Callable[[PreTrainedModel, str, LayerPlan], Stored]":
        """Stores a layer as the format holds it, or raises NotConvertible."""
        found: Callable[[PreTrainedModel, str, LayerPlan], Stored] = self._module.store
        return found

    @property
    def quantization_config(self) -> "Callable[[PreTrainedModel, dict[str, Stored]], dict[str, Any] | None]":
        """Makes what config.json says of the format; None: nothing needs to be said."""
        found: Callable[[PreTrainedModel, dict[str, Stored]], dict[str, Any] | None] = self._module.quantization_config
        return found

    @property
    def _module(self) -> Any:
        return import_module(f"{__name__}.{self.module}")


FORMATS = {
    "dense": Format("dense"),
    "compressed-tensors": Format("compressed_tensors", "compressed-tensors"),
    "gemma": Format("gemma"),
    "onnx": Format("onnx"),
}
