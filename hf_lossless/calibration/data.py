"""From whatever a user calls a data set to a list of batches."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_lossless.calibration.loss import Batch, model_device, to_device
from hf_lossless.errors import DataError
from hf_lossless.tasks.base import Task

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(dataset: Any, split: str | None = None) -> datasets.Dataset:
    """A data set as a `datasets.Dataset`.

    Args:
        dataset: A Dataset, a DatasetDict, a list of dicts, a path of a json, jsonl, csv or parquet file or of a saved
            dataset, or a Hub id.
        split: The split of a DatasetDict or Hub dataset; may be left out where there is only one.

    Raises:
        DataError: There is no such file or data set, it cannot be read, the split is not there, or there are no rows.
    """
    rows = dataset
    if isinstance(dataset, str | os.PathLike):
        rows = _load(os.fspath(dataset), split)
    elif isinstance(dataset, list):
        if not all(isinstance(row, Mapping) for row in dataset):
            raise DataError("dataset is a list, but not of dicts. Give a dict of column names to values for each row.")
        rows = datasets.Dataset.from_list([dict(row) for row in dataset])
    if isinstance(rows, datasets.DatasetDict):
        if split is None and len(rows) == 1:
            split = next(iter(rows))
        if split not in rows:
            raise DataError(
                f"split={split!r} is not in the data set, which has {', '.join(rows)}. Name one with split=."
            )
        rows = rows[split]
    if not isinstance(rows, datasets.Dataset):
        raise DataError(
            f"dataset is a {type(dataset).__name__}. Give a datasets.Dataset, a DatasetDict with split=, a list of "
            "dicts, a json, jsonl, csv or parquet path, a Hub id, or ready batches of tensors."
        )
    if not len(rows):
        raise DataError("the data set is empty: it has 0 rows. Calibration and evaluation need at least one.")
    return rows


def _load(name: str, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    path = Path(name)
    try:
        if path.is_dir():
            return datasets.load_from_disk(name)
        if path.suffix in _FORMATS:
            if not path.is_file():
                raise DataError(f"the data file {name} does not exist. Check the path.")
            return datasets.load_dataset(_FORMATS[path.suffix], data_files=name, split="train")
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the data set {name!r} cannot be read: {error}. "
            "Give a json, jsonl, csv or parquet file, a folder written by save_to_disk, or a Hub id."
        ) from error


def sample_rows(rows: datasets.Dataset, num_samples: int, seed: int) -> datasets.Dataset:
    """`num_samples` rows without repetition, or all where there are not more."""
    if len(rows) <= num_samples:
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows.select(sorted(order[:num_samples].tolist()))


def make_batches(
    rows: datasets.Dataset, task: Task, processor: Any, model: PreTrainedModel, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of rows of like length, which need the least padding; one at a time, for a test set may not fit memory.

    Raises:
        DataError: The rows do not have the task's columns, or hold what it cannot use.
    """
    order = list(range(len(rows)))
    if task.length(rows[0]) is not None:
        lengths = [task.length(row) for row in rows]
        order.sort(key=lambda index: lengths[index] or 0)
    for start in range(0, len(order), batch_size):
        yield task.encode([rows[index] for index in order[start : start + batch_size]], processor, model)


def ready_batches(dataset: Any) -> list[Batch] | None:
    """The batches, if the data set already is an iterable of tensors and not rows; None otherwise.

    Raises:
        DataError: It is a DataLoader that gives nothing.
    """
    if isinstance(dataset, DataLoader):
        batches = list(dataset)
        if not batches:
            raise DataError("the data set is empty: the DataLoader gives no batch.")
        return batches
    if isinstance(dataset, Sequence) and not isinstance(dataset, str) and dataset and _holds_tensors(dataset[0]):
        return list(dataset)
    return None


def _holds_tensors(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        return any(isinstance(value, Tensor) and value.ndim for value in batch.values())
    return isinstance(batch, tuple | list) and any(isinstance(value, Tensor) for value in batch)


def with_own_targets(model: PreTrainedModel, batches: Iterable[Batch], task: Task) -> list[Batch]:
    """Batches without labels get the model's own predictions as labels; one forward pass over those."""
    device = model_device(model)
    labelled = []
    for batch in batches:
        if isinstance(batch, Mapping) and "labels" not in batch:
            with torch.no_grad():
                logits = model(**to_device(batch, device)).logits
            batch = {**batch, "labels": task.predict(logits).cpu()}
        labelled.append(batch)
    return labelled
