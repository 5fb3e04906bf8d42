"""Formats that a compressed checkpoint can be exported to, for use without this package: `FORMATS`.

Stock transformers loads all but "onnx", which is a graph instead of a set of tensors and has a folder of its own.

This file imports none of them, so that a command line can list them quickly.
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
    """An export format that stock transformers loads, or "onnx".

    Attributes:
        module: Its module in this folder.
        package: The package that loading requires beside transformers; None: no other.
    """

    module: str
    package: str | None = None

    @property
    def store(self) -> "Callable[[PreTrainedModel, str, LayerPlan], Stored]":
        """Returns the function that stores a layer in the format, or raises NotConvertible."""
        found: Callable[[PreTrainedModel, str, LayerPlan], Stored] = self._module.store
        return found

    @property
    def quantization_config(self) -> "Callable[[PreTrainedModel, dict[str, Stored]], dict[str, Any] | None]":
        """Returns the function that makes the format's entry in config.json, or None where none is needed."""
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
