"""Saves compressed modules that are no models of transformers in one safetensors file: `save_module`, `load_module`.

The file holds every tensor once, including buffers that a state dict omits (`persistent=False`), because they could not
be recomputed on meta. Its metadata holds the plan, the dtypes that compressed layers compute in, and which names share
a tensor (a tied weight that was kept).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_lossless.errors import CheckpointError, PlanError
from hf_lossless.storage.apply import apply_plan
from hf_lossless.storage.modules.base import compressed_layers
from hf_lossless.storage.plan import FORMAT_VERSION, CompressionPlan

_KEY = "hf_lossless"
_REMEDY = "Take the file again from where it came from."


def save_module(path: str | os.PathLike[str], model: nn.Module, plan: Any) -> None:
    """Saves a compressed module, with everything that `load_module` needs.

    Args:
        path: The file to write, usually named *.safetensors.
        model: The model that `compress` compressed.
        plan: The result of `compress`, or its plan.

    Raises:
        CheckpointError: The model is not compressed as the plan says, has state that is no tensor, or the file cannot
            be written.
    """
    plan = plan if isinstance(plan, CompressionPlan) else plan.plan
    compressed = compressed_layers(model)
    planned = {name for name, layer in plan.layers.items() if layer.kind != "kept"}
    if planned != compressed.keys():
        name = sorted(planned ^ compressed.keys())[0]
        raise CheckpointError(
            f"the layer {name!r} is {'not compressed' if name in planned else 'compressed'} in this "
            f"{type(model).__name__}, and the plan says otherwise. Give the plan that compress() made for it."
        )
    tensors: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in _all_tensors(model):
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            what = "offloaded" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise CheckpointError(f"{name!r} of this {type(model).__name__} is {what} and cannot be saved as a tensor.")
        memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and memory in first:
            same_as[name] = first[memory]
        else:
            first[memory] = name
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    about = {
        "format_version": FORMAT_VERSION,
        "plan": plan.to_dict(),
        "dtypes": {name: str(module.dtype).removeprefix("torch.") for name, module in compressed.items()},
        "same_as": same_as,
    }
    try:
        save_file(tensors, path, {"format": "pt", _KEY: json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be written: {error}. Name another file.") from error


def load_module(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Loads a file of `save_module` into a model of the same class, in place.

    Args:
        path: The file.
        model: A model built as the original was, with any weights; on meta (`with torch.device("meta")`) it takes no
            memory.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: The file was not written by `save_module`, or does not hold the tensors of this model.
        PlanError: The plan does not fit the model.
    """
    about, tensors = _read(path)
    plan = CompressionPlan.from_dict(about["plan"])
    model.to("meta")
    apply_plan(model, plan.layers)
    for name, module in compressed_layers(model).items():
        module.dtype = getattr(torch, about["dtypes"][name])
    wanted = {name for name, _ in _all_tensors(model)}
    guards = {f"{name}.weight" for name in compressed_layers(model)}
    found = tensors.keys() - guards | about["same_as"].keys()
    if wanted != found:
        name = sorted(wanted ^ found)[0]
        what = "is missing from" if name in wanted else "is not in this model but in"
        raise CheckpointError(f"the tensor {name!r} {what} {os.fspath(path)}. Build the model as the original was.")
    persistent = model.state_dict().keys()
    every = {**tensors, **{name: tensors[other] for name, other in about["same_as"].items()}}
    try:
        model.load_state_dict({name: every[name] for name in persistent}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{os.fspath(path)} does not fit this {type(model).__name__}: {error}") from error
    for name in wanted - persistent:
        _set(model, name, every[name])
    for name, other in about["same_as"].items():  # makes two parameters of the same memory one again
        _set(model, name, _get(model, other))
    _refuse_what_is_left_on_meta(model)
    return model.eval()


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields everything in the state dict, and the buffers that it omits."""
    state = model.state_dict(keep_vars=True)
    yield from state.items()
    inside = compressed_layers(model)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        # Decoded tensors of a coded layer are recomputed from its bytes.
        if name not in state and not any(name.startswith(f"{layer}.") for layer in inside):
            yield name, buffer


def _get(model: nn.Module, name: str) -> Any:
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def _set(model: nn.Module, name: str, tensor: Any) -> None:
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


def _refuse_what_is_left_on_meta(model: nn.Module) -> None:
    """Raises CheckpointError where a module has a tensor on meta as a plain attribute, which no file holds."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise CheckpointError(
                    f"{f'{name}.' if name else ''}{attribute} is a tensor that is neither parameter nor buffer, so it "
                    'was not saved. Build the model without torch.device("meta"), or register it as a buffer.'
                )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(os.fspath(Path(path)), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be read: {error}. {_REMEDY}") from error
    try:
        about = json.loads(metadata[_KEY])
        version = about["format_version"]
        if not {"plan", "dtypes", "same_as"} <= about.keys():
            raise KeyError("plan, dtypes or same_as")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{os.fspath(path)} was not written by hf_lossless.save_module: {error!r}. {_REMEDY}"
        ) from error
    if version > FORMAT_VERSION:
        raise PlanError(
            f"{os.fspath(path)} has format version {version}, this release of hf_lossless reads up to "
            f"{FORMAT_VERSION}. Upgrade with: pip install --upgrade hf-lossless"
        )
    return about, tensors
