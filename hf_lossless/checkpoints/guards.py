"""Guards against loading without this package, and the check that files hold the tensors of a compressed model.

The tensors of a compressed checkpoint are in safetensors files, its plan is in config.json. Each compressed layer also
has an empty tensor under the weight's original name, the guard: transformers without this package would ignore the plan
with no more than a line in its log, build the original model and fill it with random weights; the guard's shape [0]
makes it stop.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from hf_lossless.checkpoints.saved_folder import DTYPES, headers
from hf_lossless.errors import CheckpointError
from hf_lossless.storage.modules.activations import QuantisedInput
from hf_lossless.storage.modules.base import compressed_layers
from hf_lossless.storage.modules.coded import CodedModule
from hf_lossless.storage.modules.packed import PackedModule

_REMEDY = "Take the folder again from where it came from."


def state_dict_with_guards(model: nn.Module) -> dict[str, Tensor]:
    """Returns the model's tensors and a guard for every compressed layer, including offloaded ones."""
    return {**model.state_dict(), **{name: torch.empty(1)[:0] for name in guard_names(model)}}


def guard_names(model: nn.Module) -> set[str]:
    """Returns the names of the guards: the original names of the compressed layers' weights."""
    return {f"{name}.weight" for name in compressed_layers(model)}


def check_files(
    files: Iterable[str | os.PathLike[str]],
    model: nn.Module,
    rename: Callable[[str], str],
    *,
    complete: bool,
    as_saved: bool = False,
    resized: Collection[str] = (),
    ties: Mapping[str, str] | None = None,
    unsaved: Collection[str] = (),
) -> None:
    """Compares the headers of safetensors files with the tensors that a compressed model needs.

    Args:
        files: The checkpoint's files, with all shards.
        model: The model with its compressed modules in place, on meta or real.
        rename: Maps a tensor's name on disk to its name in the model.
        complete: Whether the files must hold exactly this model's tensors. False for a model that shares only a part
            with the saved one (another head): then only compressed layers are compared.
        as_saved: Whether the files are known, by their bytes, to be those that were saved. A tensor outside of
            compressed layers that is missing or of another shape then belongs to a model that differs (a pooler that
            the saved one did not have, a head for other labels), and transformers decides whether to accept it.
        resized: Layers that are not compressed in this model, because their shape differs from the saved one.
        ties: Maps the name of each tied tensor to that of the tensor it shares; the files hold one of them.
        unsaved: Names of tensors that the model recomputes and does not save.

    Raises:
        CheckpointError: A file is truncated or no safetensors file, or a tensor is missing, unexpected, or of the wrong
            dtype or shape.
    """
    guards = guard_names(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in guards}
    expected = {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    compressed = set(compressed_layers(model))
    packed = _packed_names(model)
    found: set[str] = set()
    for file in files:
        for disk_name, dtype, shape in headers(file):
            name = rename(disk_name)
            where = f"the tensor {disk_name!r} in {os.fspath(file)}"
            if name in guards:
                continue
            if name not in expected:
                if (complete and not _is_inside(name, resized)) or _is_inside(name, compressed):
                    raise CheckpointError(f"{where} does not belong to this checkpoint. {_REMEDY}")
                continue
            if name in found:
                raise CheckpointError(f"{where} is there twice. {_REMEDY}")
            found.add(name)
            wanted_dtype, wanted_shape = expected[name]
            if shape != wanted_shape and not (as_saved and not _is_inside(name, compressed)):
                raise CheckpointError(
                    f"{where} has shape {list(shape)}, the plan needs {list(wanted_shape)}. {_REMEDY}"
                )
            # A model may be loaded in another floating dtype; codes and scales keep theirs.
            if dtype != wanted_dtype and (name in packed or not {dtype, wanted_dtype} <= {"F16", "BF16", "F32", "F64"}):
                raise CheckpointError(f"{where} is of type {dtype}, the plan needs {wanted_dtype}. {_REMEDY}")
    ties = ties or {}
    there = {ties.get(name, name) for name in found}
    missing = [
        name
        for name in expected
        if ties.get(name, name) not in there and ((complete and not as_saved) or _is_inside(name, compressed))
        if name not in unsaved
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"the tensor {missing[0]!r}{more} is missing from the checkpoint. {_REMEDY}")


def _packed_names(model: nn.Module) -> set[str]:
    """Returns the names of the tensors whose dtype does not depend on the model's: codes, scales and zeros."""
    kinds = (PackedModule, CodedModule, QuantisedInput)
    packed = ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))
    return {f"{name}.{part}" for name, module in packed for part, _ in module.named_buffers()}


def _is_inside(tensor_name: str, modules: Collection[str]) -> bool:
    """Returns whether a tensor lies in one of these modules, at any depth."""
    parts = tensor_name.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts)))
