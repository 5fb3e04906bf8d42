"""Exports a compressed checkpoint to a format that stock transformers loads.

Each layer is stored in the format, or kept in floating point where that is allowed; everything else is saved unchanged.
The result is then loaded back with stock transformers, before the folder is renamed: transformers ignores tensors that
it finds no module for, and fills the module with random weights.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_lossless.checkpoints.entry import meet_demand
from hf_lossless.checkpoints.exports import FORMATS, dense
from hf_lossless.checkpoints.exports.convert import NotConvertible, Stored, model_dtype
from hf_lossless.checkpoints.files import new_folder, refuse_occupied
from hf_lossless.checkpoints.saved_folder import SavedFolder, tensor_sizes
from hf_lossless.errors import CheckpointError, ConfigurationError, reason
from hf_lossless.storage.modules.base import CompressedModule, compressed_layers
from hf_lossless.storage.plan import json_bytes
from hf_lossless.storage.runtime.optimize import optimize

_LEFT_BEHIND = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),  # written anew
    *("README.md", "*.html", "*.png", "*.svg"),  # model card, report and pictures of the compressed model
    ".*",
)
_SUBFOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        format: Name of the format.
        size_bytes: Bytes of all tensors and of the entry "quantization_config" of config.json; or of an ONNX file.
        compressed_bytes: Bytes of the compressed checkpoint, counted in the same way.
        converted: Names of the layers that are stored in the format.
        dense: Reasons why the other compressed layers are in floating point now, by their names.
        dtype: Dtype of the model.
        rounded: Names of the layers whose scales had to be rounded to it (the bound is in `exports.convert`).
        float_inputs: Names of the layers whose inputs are quantised in the checkpoint, but not in the export.
        certified: Whether the checkpoint has a certificate; the export has none.
        runtime: The run time that an ONNX graph is made for; None for other formats.
        difference: Relative difference between the ONNX graph's outputs and the model's, on random inputs.
    """

    format: str
    size_bytes: int
    compressed_bytes: int
    converted: tuple[str, ...]
    dense: dict[str, str]
    dtype: torch.dtype
    rounded: tuple[str, ...]
    float_inputs: tuple[str, ...]
    certified: bool
    runtime: str | None = None
    difference: float | None = None


def export(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    *,
    allow_dense: bool = False,
    runtime: str | None = None,
) -> ExportResult:
    """Writes a compressed checkpoint in another format, which needs no hf_lossless.

    The files of a tokenizer or a processor are copied; model card and certificate are not, because they describe the
    checkpoint that was measured.

    Args:
        folder: A folder with a compressed checkpoint.
        out: The folder to write; must not exist, or be empty. It is written completely or not at all.
        format: "dense", "compressed-tensors", "gemma" or "onnx".
        allow_dense: Keep in floating point what the format cannot hold: weights, and quantised inputs of layers. The
            format "onnx" holds everything.
        runtime: The run time of a graph of the format "onnx": "fast" (the default), "small" or "standard".

    Returns:
        Sizes, and how each compressed layer is stored.

    Raises:
        CheckpointError: `folder` holds no compressed checkpoint, or `out` cannot be written or lies inside it.
        ConfigurationError: The format is unknown, needs a package that is not installed, cannot hold some layers (they
            are listed), or stock transformers does not load it for this architecture; or the runtime is unknown, or
            given for another format than "onnx".

    Example:
        >>> export("no-such-folder", "out", "dense")
        Traceback (most recent call last):
        hf_lossless.errors.CheckpointError: no-such-folder/config.json cannot be read: No such file or directory. \
Give a folder written by hf_lossless.
    """
    folder, out = Path(folder), Path(out)
    if format not in FORMATS:
        raise ConfigurationError(f"the format {format!r} is unknown. Take one of {', '.join(FORMATS)}.")
    chosen, saved = FORMATS[format], SavedFolder.read(folder)
    if runtime is not None and format != "onnx":
        raise ConfigurationError(f"runtime={runtime!r} is for the format onnx, not for {format}. Leave it out.")
    _refuse_inside(folder, out)
    refuse_occupied(out)
    if format == "onnx":
        return _export_graph(saved, out, "fast" if runtime is None else runtime)
    if chosen.package is not None and find_spec(chosen.package.replace("-", "_")) is None:
        raise ConfigurationError(
            f"the format {format} is loaded with the package {chosen.package}, which is not installed. "
            f"Install it: pip install {chosen.package}"
        )
    model = _load(saved)
    modules, plans = compressed_layers(model), saved.entry.plan.layers
    stored: dict[str, Stored] = {}
    refused: dict[str, str] = {}
    for name in modules:
        try:
            stored[name] = chosen.store(model, name, plans[name])
        except NotConvertible as error:
            refused[name] = str(error)
    pointless = not stored and format != "dense"
    if pointless or (refused and not allow_dense):
        raise ConfigurationError(_refusal(format, refused, len(modules), pointless))
    settings, dtype = chosen.quantization_config(model, stored), model_dtype(model)
    tensors = _tensors(model, modules, {**{name: dense.store_weight(modules[name]) for name in refused}, **stored})
    with new_folder(out) as temporary:
        _save(model, tensors, settings, temporary)
        _carry_over(folder, temporary)
        _refuse_unreadable(temporary, type(model), tensors, format)
    tensor_bytes = sum(tensor_sizes(sorted(out.glob("*.safetensors"))).values())
    return ExportResult(
        format=format,
        size_bytes=tensor_bytes + (0 if settings is None else json_bytes(settings)),
        compressed_bytes=saved.entry.size_bytes,
        converted=tuple(stored),
        dense=refused,
        dtype=dtype,
        rounded=tuple(name for name, layer in stored.items() if layer.rounded),
        float_inputs=tuple(name for name, module in modules.items() if module.activation is not None),
        certified=saved.entry.certificate is not None,
    )


def _export_graph(saved: SavedFolder, out: Path, runtime: str) -> ExportResult:
    """Writes the folder of the format "onnx"."""
    from hf_lossless.checkpoints.exports.onnx.export import checked_runtime, refuse_missing_packages, write_onnx

    asked = checked_runtime(runtime)
    refuse_missing_packages()
    model = _load(saved)
    dtype, names = model_dtype(model), tuple(compressed_layers(model))
    with new_folder(out) as temporary:
        written = write_onnx(model, saved.path, temporary, asked)
        _carry_over(saved.path, temporary)
    return ExportResult(
        format="onnx",
        size_bytes=written.num_bytes,
        compressed_bytes=saved.entry.size_bytes,
        converted=names,
        dense={},
        dtype=dtype,
        rounded=(),
        float_inputs=(),
        certified=saved.entry.certificate is not None,
        runtime=asked,
        difference=written.difference,
    )


def by_reason(refused: Mapping[str, str]) -> dict[str, list[str]]:
    """Groups the names of layers by the reason why a format cannot hold them."""
    names = defaultdict(list)
    for name, why in refused.items():
        names[why].append(name)
    return dict(names)


def _refusal(format: str, refused: Mapping[str, str], total: int, pointless: bool) -> str:
    remedy = "Keep these in floating point with allow_dense=True (--allow-dense), or take another format."
    return "\n".join(
        [
            f"the format {format} cannot hold {len(refused)} of {total} compressed layers:",
            *(f"  {why}: {', '.join(names)}" for why, names in by_reason(refused).items()),
            "Take another format." if pointless else remedy,
        ]
    )


def _refuse_inside(folder: Path, out: Path) -> None:
    """Raises CheckpointError for an output inside the checkpoint, which would be copied into itself."""
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise CheckpointError(
            f"the output folder {out} is the checkpoint {folder} or lies inside it. Name another one."
        )


def _load(saved: SavedFolder) -> PreTrainedModel:
    """Loads the compressed model, of the class that was saved."""
    model_class = getattr(transformers, saved.architecture, None)
    if model_class is None:
        raise CheckpointError(
            f"{saved.path} is of the class {saved.architecture!r}, which transformers {transformers.__version__} "
            "lacks: stock transformers could not load an export of it."
        )
    model: PreTrainedModel = model_class.from_pretrained(saved.path)
    if compressed_layers(model):
        optimize(model, "exact")  # what is written is compared with the saved values
    return model


def _tensors(
    model: PreTrainedModel, modules: Mapping[str, CompressedModule], stored: Mapping[str, Stored]
) -> dict[str, Tensor]:
    """Collects all tensors to save: compressed layers in their new form, biases and all others unchanged."""
    weight_names = {f"{name}.{part}" for name, module in modules.items() for part in (*module.weight_tensors, "weight")}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in weight_names}
    replaced = {f"{name}.{part}": tensor for name, layer in stored.items() for part, tensor in layer.tensors.items()}
    return {**kept, **replaced}


def _save(model: PreTrainedModel, tensors: dict[str, Tensor], settings: dict[str, Any] | None, folder: Path) -> None:
    """Saves tensors as an original model of transformers, without the plug-in."""
    del model.hf_quantizer, model.config.quantization_config, model._weight_conversions
    meet_demand(model.config)
    # Only plain weights are saved under the names, and in the shapes, that an architecture has on disk.
    model.save_pretrained(folder, state_dict=dict(tensors), save_original_format=settings is None)
    if settings is not None:
        path = folder / "config.json"
        values = {**json.loads(path.read_text(encoding="utf-8")), "quantization_config": settings}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _carry_over(folder: Path, out: Path) -> None:
    """Copies the files of a tokenizer or processor: all but the model's, and those that describe its compression."""
    for path in folder.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in _LEFT_BEHIND):
            shutil.copy(path, out)
    if (folder / _SUBFOLDER).is_dir():
        shutil.copytree(folder / _SUBFOLDER, out / _SUBFOLDER)


def _refuse_unreadable(
    folder: Path, model_class: type[PreTrainedModel], tensors: Mapping[str, Tensor], format: str
) -> None:
    """Raises ConfigurationError where stock transformers does not load exactly the tensors that were saved."""
    about = f"stock transformers {transformers.__version__} cannot load a {model_class.__name__} in the format {format}"
    try:
        loading: Any = model_class.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # of any kind, because architectures and formats raise their own
        raise ConfigurationError(f"{about}: {type(error).__name__}: {reason(error)}. Take another format.") from error
    again, found = loading
    loaded = again.state_dict()
    changed = sorted(name for name, tensor in tensors.items() if not _same(loaded.get(name), tensor))
    changed += [str(name) for names in found.values() for name in names]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ConfigurationError(
            f"{about}: the tensor {changed[0]!r}{more} is not what was saved. Take another format."
        )


def _same(loaded: Tensor | None, saved: Tensor) -> bool:
    return loaded is not None and loaded.dtype == saved.dtype and torch.equal(loaded, saved)
