"""`SavedFolder`: config.json and file headers of a saved folder, read once and checked against each other.

Inspection, reports, exports, uploads and model cards all use it, so that they accept and refuse the same folders, and
read the same files.
"""

import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.checkpoints.files import read_json
from hf_lossless.checkpoints.record import CompressionRecord, plan_in_order, read_record_of
from hf_lossless.errors import CheckpointError
from hf_lossless.storage.plan import QUANT_METHODS, CompressionPlan

DTYPES = {
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
_ITEM_BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
_REMEDY = "Take the folder again from where it came from."


@dataclass(frozen=True)
class SavedFolder:
    """A folder with a compressed checkpoint.

    Attributes:
        path: The folder.
        config: All values of config.json.
        entry: Its entry "quantization_config".
        weight_files: The safetensors files that from_pretrained reads.
        tensor_bytes: Bytes of each tensor in them, by its name on disk.
    """

    path: Path
    config: Mapping[str, Any]
    entry: LosslessCheckpointConfig
    weight_files: tuple[Path, ...]
    tensor_bytes: Mapping[str, int]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "SavedFolder":
        """Reads config.json, and the headers of the weight files.

        Raises:
            CheckpointError: There is no config.json, it is not JSON, or the model in it is not compressed by this
                package; or a file is missing or truncated, or the files hold other bytes than the plan says.
            PlanError: The plan is malformed.
        """
        config = read_json(Path(path) / "config.json", "Give a folder written by hf_lossless.", _REMEDY)
        entry = config.get("quantization_config") if isinstance(config, Mapping) else None
        if not isinstance(entry, Mapping) or entry.get("quant_method") not in QUANT_METHODS:
            raise CheckpointError(
                f"{path} holds no model compressed by hf_lossless. Compress one with: hf-lossless compress"
            )
        read = LosslessCheckpointConfig.from_dict(dict(entry))
        assert isinstance(read, LosslessCheckpointConfig)
        files = weight_files(path)
        sizes = tensor_sizes(files)
        _refuse_other_bytes(read.plan, sum(sizes.values()))
        return cls(Path(path), config, read, tuple(files), sizes)

    @functools.cached_property
    def record(self) -> CompressionRecord | None:
        """Reads the record of the compression, compression.json; None where the folder has none.

        Raises:
            CheckpointError: It is malformed or cannot be read, or belongs to another plan than the one in config.json.
        """
        return read_record_of(self.path, self.entry.plan)

    @property
    def plan(self) -> CompressionPlan:
        """Returns the plan, with its layers in the model's own order as far as that is known."""
        return plan_in_order(self.entry.plan, self.record)

    @property
    def architecture(self) -> str:
        """Returns the name of the class that was saved."""
        return str(next(iter(self.config.get("architectures") or ()), "PreTrainedModel"))


def tensor_sizes(files: Iterable[str | os.PathLike[str]]) -> dict[str, int]:
    """Computes the bytes of each tensor in safetensors files, by its name on disk, from the headers.

    Raises:
        CheckpointError: A file is truncated or no safetensors file, or holds a dtype that torch does not have.
    """
    sizes = {}
    for file in files:
        for name, dtype, shape in headers(file):
            if dtype not in _ITEM_BYTES:
                raise CheckpointError(
                    f"the tensor {name!r} in {os.fspath(file)} is of the unknown type {dtype}. {_REMEDY}"
                )
            sizes[name] = math.prod(shape) * _ITEM_BYTES[dtype]
    return sizes


def refuse_other_bytes(plan: CompressionPlan, files: Iterable[str | os.PathLike[str]]) -> None:
    """Raises CheckpointError where a plan's bytes differ from those of its files."""
    _refuse_other_bytes(plan, sum(tensor_sizes(files).values()))


def _refuse_other_bytes(plan: CompressionPlan, found: int) -> None:
    if found != plan.tensor_bytes:
        raise CheckpointError(
            f"the plan in config.json speaks of {plan.tensor_bytes} bytes of tensors, the files hold {found}. {_REMEDY}"
        )


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Lists the safetensors files that from_pretrained reads: one, or the shards that an index names.

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


def headers(file: str | os.PathLike[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yields name, dtype and shape of each tensor of a file, from its header."""
    try:
        with safe_open(os.fspath(file), framework="pt") as tensors:
            for name in tensors.keys():  # not a mapping
                piece = tensors.get_slice(name)
                yield name, piece.get_dtype(), tuple(piece.get_shape())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{os.fspath(file)} is truncated or no safetensors file: {error}. {_REMEDY}") from error
