"""Saved folders: written whole or not at all, and checked before a tensor is read.

The tensors of a compressed checkpoint are in safetensors files, its plan is in config.json. Beside the tensors of
a compressed layer lies an empty tensor under the weight's old name, the guard: a transformers that does not know this
package ignores the plan with no more than a line in its log, builds the original model and would fill it with random
weights; the guard's shape [0] makes it stop.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_lossless.config import QUANT_METHOD, LosslessCheckpointConfig
from hf_lossless.errors import CheckpointError
from hf_lossless.storage.modules.activations import QuantisedInput
from hf_lossless.storage.modules.base import compressed_layers
from hf_lossless.storage.modules.coded import CodedModule
from hf_lossless.storage.modules.packed import PackedModule
from hf_lossless.storage.plan import CompressionPlan

_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in _DTYPES.items()}
_REMEDY = "Take the folder again from where it came from."


def state_dict_with_guards(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, and a guard for every compressed layer."""
    return {**model.state_dict(), **{name: torch.empty(0) for name in guard_names(model)}}


def guard_names(model: nn.Module) -> set[str]:
    """Names of the empty tensors: those that the weights of the compressed layers had."""
    return {f"{name}.weight" for name in compressed_layers(model)}


def check_files(
    files: Iterable[str | os.PathLike[str]],
    model: nn.Module,
    rename: Callable[[str], str],
    *,
    complete: bool,
    ties: Mapping[str, str] | None = None,
    unsaved: Collection[str] = (),
) -> None:
    """Compares the headers of safetensors files with the tensors that a compressed model needs.

    Args:
        files: The checkpoint's files, all its shards.
        model: The model with its compressed modules in place, on meta or real.
        rename: From a tensor's name on disk to its name in the model.
        complete: Whether the files must hold this very model, no tensor less and none more. False for a model that
            shares only a part with the one that was saved (another head): then only compressed layers are compared.
        ties: From a tensor's name to that of the tensor it is the same as; the files hold one of them.
        unsaved: Names of tensors that the model computes anew and does not save.

    Raises:
        CheckpointError: A file is truncated or no safetensors file, or a tensor is missing, one too many, or of the
            wrong dtype or shape.
    """
    expected = {name: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    guards = guard_names(model)
    compressed = set(compressed_layers(model))
    packed = _packed_names(model)
    found: set[str] = set()
    for file in files:
        for disk_name, dtype, shape in _headers(file):
            name = rename(disk_name)
            where = f"the tensor {disk_name!r} in {os.fspath(file)}"
            if name in guards:
                continue
            if name not in expected:
                if complete or _is_inside(name, compressed):
                    raise CheckpointError(f"{where} does not belong to this checkpoint. {_REMEDY}")
                continue
            if name in found:
                raise CheckpointError(f"{where} is there twice. {_REMEDY}")
            found.add(name)
            wanted_dtype, wanted_shape = expected[name]
            if shape != wanted_shape:
                raise CheckpointError(
                    f"{where} has shape {list(shape)}, the plan needs {list(wanted_shape)}. {_REMEDY}"
                )
            # A model may be loaded in another floating dtype; codes and scales may not.
            if dtype != wanted_dtype and (name in packed or not {dtype, wanted_dtype} <= {"F16", "BF16", "F32", "F64"}):
                raise CheckpointError(f"{where} is of type {dtype}, the plan needs {wanted_dtype}. {_REMEDY}")
    ties = ties or {}
    there = {ties.get(name, name) for name in found}
    missing = [
        name
        for name in expected
        if ties.get(name, name) not in there and (complete or _is_inside(name, compressed))
        if name not in unsaved
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"the tensor {missing[0]!r}{more} is missing from the checkpoint. {_REMEDY}")


def _packed_names(model: nn.Module) -> set[str]:
    """Names of the tensors that are of one dtype whatever the model is loaded in: codes, scales and zeros."""
    kinds = (PackedModule, CodedModule, QuantisedInput)
    packed = ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))
    return {f"{name}.{part}" for name, module in packed for part, _ in module.named_buffers()}


def _is_inside(tensor_name: str, modules: Collection[str]) -> bool:
    """Whether a tensor lies in one of these modules, at any depth."""
    parts = tensor_name.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts)))


def tensor_sizes(files: Iterable[str | os.PathLike[str]]) -> dict[str, int]:
    """Bytes of each tensor in safetensors files, in its own dtype, by its name on disk; only headers are read.

    Raises:
        CheckpointError: A file is truncated or no safetensors file, or holds a dtype that torch does not have.
    """
    sizes = {}
    for file in files:
        for name, dtype, shape in _headers(file):
            if dtype not in _ITEM_BYTES:
                raise CheckpointError(
                    f"the tensor {name!r} in {os.fspath(file)} is of the unknown type {dtype}. {_REMEDY}"
                )
            sizes[name] = math.prod(shape) * _ITEM_BYTES[dtype]
    return sizes


def refuse_other_bytes(plan: CompressionPlan, files: Iterable[str | os.PathLike[str]]) -> None:
    """Raises CheckpointError where a plan's sizes are not those of the files that it came with."""
    found = sum(tensor_sizes(files).values())
    if found != plan.tensor_bytes:
        raise CheckpointError(
            f"the plan in config.json speaks of {plan.tensor_bytes} bytes of tensors, the files hold {found}. {_REMEDY}"
        )


def check_folder(folder: str | os.PathLike[str]) -> LosslessCheckpointConfig:
    """What a saved folder says of itself, which its files must bear out.

    Raises:
        CheckpointError: As for `read_entry`; or a file is missing, truncated, or the files hold other bytes than the
            plan says.
        PlanError: The plan is malformed.
    """
    entry = read_entry(folder)
    refuse_other_bytes(entry.plan, weight_files(folder))
    return entry


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that from_pretrained reads: one, or the shards that an index names.

    Raises:
        CheckpointError: There are none, one that the index names is missing, or the index cannot be read.
    """
    whole, index = Path(folder) / SAFE_WEIGHTS_NAME, Path(folder) / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. {_REMEDY}")
    try:
        names = sorted(set(read_json(index, _REMEDY, _REMEDY)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error!r}. {_REMEDY}") from error
    for name in names:
        if not (Path(folder) / str(name)).is_file():
            raise CheckpointError(f"the shard {name} that {index} names is missing. {_REMEDY}")
    return [Path(folder) / name for name in names]


def _headers(file: str | os.PathLike[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each tensor of a file, from its header."""
    try:
        with safe_open(os.fspath(file), framework="pt") as tensors:
            for name in tensors.keys():  # not a mapping
                piece = tensors.get_slice(name)
                yield name, piece.get_dtype(), tuple(piece.get_shape())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{os.fspath(file)} is truncated or no safetensors file: {error}. {_REMEDY}") from error


def read_entry(folder: str | os.PathLike[str]) -> LosslessCheckpointConfig:
    """What a saved folder says of itself.

    Raises:
        CheckpointError: There is no config.json, it is not JSON, or the model in it is not compressed by this package.
        PlanError: Its plan is malformed.
    """
    values = read_config(folder)
    entry = values.get("quantization_config") if isinstance(values, Mapping) else None
    if not isinstance(entry, Mapping) or entry.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{folder} holds no model compressed by hf_lossless. Compress one with: hf-lossless compress"
        )
    config = LosslessCheckpointConfig.from_dict(dict(entry))
    assert isinstance(config, LosslessCheckpointConfig)
    return config


def read_config(folder: str | os.PathLike[str]) -> Any:
    """All that config.json says, of a saved folder or of any other.

    Raises:
        CheckpointError: It cannot be read, or is not JSON.
    """
    return read_json(Path(folder) / "config.json", "Give a folder written by hf_lossless.", _REMEDY)


def read_json(path: Path, remedy: str, malformed_remedy: str) -> Any:
    """The values in a JSON file.

    Raises:
        CheckpointError: It cannot be read, or is not JSON; the message ends with the one remedy or the other.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. {remedy}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}. {malformed_remedy}") from error


def write_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all; one that is there is replaced at once.

    Raises:
        CheckpointError: There is no folder to write it to, or it may not be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)  # it is still there only where something went wrong
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}. Name another file.") from error


@contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and is removed when not.

    Raises:
        CheckpointError: `target` is there and is not an empty folder.
    """
    target = Path(os.path.realpath(target))  # "." has no name to make a temporary one of; a link stays a link
    refuse_occupied(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        refuse_occupied(target)  # it may have come meanwhile
        temporary.chmod(0o755)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_occupied(target: str | os.PathLike[str]) -> None:
    """Raises CheckpointError where `target` is a file or a folder with something in it, or cannot be written."""
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"the output folder {target} exists and is not empty. Remove it, or name another one.")
    if os.path.ismount(os.path.realpath(target)):
        raise CheckpointError(
            f"the output folder {target} is a mount point, which a finished folder cannot take the place of. "
            f"Name a folder inside it, say {target / 'model'}."
        )
    above = next(folder for folder in Path(os.path.abspath(target)).parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise CheckpointError(
            f"the output folder {target} cannot be written: {above} is not a folder that you may write to. "
            "Name another one."
        )
