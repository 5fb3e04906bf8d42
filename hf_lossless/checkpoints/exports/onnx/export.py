"""A compressed model as one ONNX file, checked before it is kept.

    onnx/model.onnx    where optimum's ORTModel classes, sentence-transformers and transformers.js all look
    config.json        without our entry; "transformers.js_config" says that the file's name has no suffix for a dtype

Rows and the length of a text may be any; other axes are as in the example. Models in 16 bits are exported in float32.
"""

import json
import warnings
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lossless.checkpoints.exports.onnx.check import LIMITS, largest_difference
from hf_lossless.checkpoints.exports.onnx.signature import Signature, signature_of
from hf_lossless.checkpoints.exports.onnx.standard import pack_int4
from hf_lossless.checkpoints.exports.onnx.swap import RUNTIMES, Runtime, onnx_forms
from hf_lossless.errors import ConfigurationError, reason
from hf_lossless.storage.runtime.optimize import optimize

FILE = Path("onnx/model.onnx")
"""Inside the folder."""

_OPSET = 21
"""The first with blocks in DequantizeLinear."""

_LARGEST_BYTES = 2**31 - 2**20
"""Of one protobuf message, with room for the graph."""

_SHAPES = ((2, 16), (1, 7), (3, 24))
"""Rows and length: of the example that is traced, and of the two that are compared."""


_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        num_bytes: Of the file.
        difference: Of its outputs from the model's (see `check`).
    """

    num_bytes: int
    difference: float


def checked_runtime(name: str) -> Runtime:
    """Returns the name of a run time, once it is checked.

    Raises:
        ConfigurationError: There is none.
    """
    for runtime in RUNTIMES:
        if name == runtime:
            return runtime
    raise ConfigurationError(f"runtime={name!r} is unknown to the format onnx. Take one of {', '.join(RUNTIMES)}.")


def refuse_missing_packages() -> None:
    """Raises ConfigurationError where a package of the extra "onnx" is not installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"the format onnx is made with {', '.join(_PACKAGES)}, of which {', '.join(missing)} is not installed. "
            'Install them: pip install "hf-lossless[onnx]"'
        )


def write_onnx(model: PreTrainedModel, source: Path, out: Path, runtime: Runtime) -> Written:
    """Writes a model's graph and its config into a folder.

    Args:
        model: The loaded model; it is in float32 afterwards.
        source: The checkpoint's folder.
        out: The folder to write into.
        runtime: What the graph is for.

    Raises:
        ConfigurationError: The architecture cannot be exported, or what onnxruntime makes of the file is another model.
    """
    name = type(model).__name__
    signature = signature_of(model, source)
    optimize(model, "exact")
    nn.Module.float(model)  # its own `float` is refused to compressed models
    model.set_attn_implementation("eager")  # a masked softmax as three operators, not as eight
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    traced, *compared = (signature.example(*shape, seed) for seed, shape in enumerate(_SHAPES))
    wrapped = _InOrder(model, signature, traced)
    with torch.no_grad():
        expected = [dict(zip(wrapped.outputs, wrapped(*inputs.values()), strict=True)) for inputs in compared]
        with onnx_forms(model, runtime, traced):
            graph = _graph(wrapped, signature, traced, name)
    pack_int4(graph.model)
    _forget_trace(graph.model)
    _refuse_large(graph.model, name)
    path = out / FILE
    path.parent.mkdir()
    graph.save(path)
    difference = largest_difference(path, list(zip(compared, expected, strict=True)))
    if not difference <= LIMITS[runtime]:
        raise ConfigurationError(
            f"the ONNX file of this {name} with runtime={runtime!r} gives outputs that differ by {difference:.2g} of "
            f"their size from the model's; allowed is {LIMITS[runtime]:g}. Take another runtime, or the format dense."
        )
    _save_config(model, out)
    return Written(path.stat().st_size, difference)


class _InOrder(nn.Module):
    """A model with its inputs in a fixed order, which gives a tuple of tensors.

    Attributes:
        outputs: Names of those outputs that the model has.
    """

    def __init__(self, model: PreTrainedModel, signature: Signature, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(inputs)
        with torch.no_grad():
            found = model(**inputs)
        self.outputs = tuple(name for name in signature.outputs if found.get(name) is not None)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs."""
        found = self.model(**dict(zip(self.names, tensors, strict=True)))
        return tuple(found[name] for name in self.outputs)


def _graph(wrapped: _InOrder, signature: Signature, inputs: dict[str, Tensor], name: str) -> Any:
    """The traced graph, a torch.onnx.ONNXProgram."""
    dimensions = {axis: torch.export.Dim(axis) for axes in signature.axes.values() for axis in axes.values()}
    shapes = tuple({index: dimensions[axis] for index, axis in signature.axes[one].items()} for one in inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.export about its own insides
            return torch.onnx.export(
                wrapped,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(wrapped.outputs),
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes={"tensors": shapes},
                verbose=False,
            )
    except Exception as error:  # of whatever kind: it is raised in the depths of an architecture or of torch.export
        cause = error.__cause__ or error
        raise ConfigurationError(
            f"torch {metadata.version('torch')} cannot export a {name} to ONNX: {type(cause).__name__}: "
            f"{reason(error)[:500]}. Take another format."
        ) from error


def _forget_trace(model: Any) -> None:
    """Removes what torch notes of each node: names of modules, and lines of source with paths of this machine."""
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _refuse_large(model: Any, name: str) -> None:
    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if num_bytes > _LARGEST_BYTES:
        raise ConfigurationError(
            f"the weights of this {name} take {num_bytes:,} bytes, and an ONNX file holds {_LARGEST_BYTES:,}. "
            "Compress it further, take runtime='small', or take another format."
        )


def _save_config(model: PreTrainedModel, out: Path) -> None:
    """Writes config.json as an original model's."""
    del model.config.quantization_config
    model.config.save_pretrained(out)
    path = out / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values = {**values, "architectures": [type(model).__name__], "transformers.js_config": {"dtype": "fp32"}}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
