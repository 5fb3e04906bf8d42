"""Turns a user's data set, in any of the accepted forms, into a list of batches.

The official files of SQuAD v1.1 and v2 nest questions in paragraphs in articles; they are read as one row per question:

{"data": [{"paragraphs": [{"context": .., "qas": [{"id": .., "question": .., "answers": [..]}]}]}]}
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils.generic import find_labels

from hf_lossless.data.batches import Batch, model_device, to_device
from hf_lossless.data.tasks.base import Task
from hf_lossless.data.tasks.columns import ROW_NUMBER, Row
from hf_lossless.data.tasks.labels import model_labels
from hf_lossless.data.tasks.registry import TASKS, task_of
from hf_lossless.errors import ConfigurationError, DataError, check_whole_number, reason


def one_question_a_row(rows: datasets.Dataset) -> datasets.Dataset:
    """Flattens an official SQuAD file into one row per question, with the Hub's columns.

    A data set of another form is returned unchanged.
    """
    if "data" not in rows.column_names:
        return rows
    articles = list(_articles(rows))
    if not all(isinstance(article, Mapping) and "paragraphs" in article for article in articles):
        return rows
    return datasets.Dataset.from_list(
        [
            {
                "id": question["id"],
                "question": question["question"],
                "context": paragraph["context"],
                "answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")},
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    )


def _articles(rows: datasets.Dataset) -> Iterator[Any]:
    """Yields the articles, whether datasets has read their list as one row or as a row for each article."""
    for row in rows:
        yield from row["data"] if isinstance(row["data"], list) else [row["data"]]


_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows a model is calibrated and judged on, and how they are read.

    Attributes:
        dataset: Rows, or ready batches (see `load_rows` and `ready_batches`).
        selection_dataset: Rows on which plans are compared; None: a part of `dataset`.
        certification_dataset: Rows that the certificate rests on; None: a part of `dataset` likewise.
        split: Which split of a data set that has several.
        task: Name of the task; None: by the model's class.
        processor: Tokenizer or image processor; None: the one saved with the model.
        num_samples: Rows to calibrate on.
        batch_size: Rows in a calibration batch.
        seed: Seed of sampling, of splits, and of whatever else is random.

    Raises:
        ConfigurationError: A number is out of range.
    """

    dataset: Any = None
    selection_dataset: Any = None
    certification_dataset: Any = None
    split: str | None = None
    task: str | None = None
    processor: Any = None
    num_samples: int = 128
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("num_samples", 1), ("batch_size", 1), ("seed", 0)):
            check_whole_number(name, getattr(self, name), lowest)


def load_rows(dataset: Any, split: str | None = None) -> datasets.Dataset:
    """Loads a data set as a `datasets.Dataset`.

    Args:
        dataset: A Dataset, a DatasetDict, a list of dicts, a path of a json, jsonl, csv or parquet file, of a saved
            dataset or of a folder of images (one folder per class, with or without train/, validation/ and so on above
            them), or a Hub id.
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
        try:
            rows = datasets.Dataset.from_list([dict(row) for row in dataset])
        except (ValueError, TypeError, OverflowError) as error:
            raise DataError(
                f"the rows of the list do not have one type for each column: {reason(error)}. Give every row the same "
                "columns, with values of the same type."
            ) from error
    if isinstance(rows, datasets.DatasetDict):
        rows = _one_split(rows, split)
    elif split is not None and not isinstance(dataset, str | os.PathLike) and str(getattr(rows, "split", "")) != split:
        raise DataError(f"split={split!r}, but dataset is a {type(dataset).__name__} and has no splits. Leave it out.")
    if not isinstance(rows, datasets.Dataset):
        raise DataError(
            f"dataset is a {type(dataset).__name__}. Give a datasets.Dataset, a DatasetDict with split=, a list of "
            "dicts, a json, jsonl, csv or parquet path, a Hub id, or ready batches of tensors."
        )
    if not len(rows):
        raise _empty(dataset)
    return rows.with_format(None)  # plain values, even where the caller set a format of tensors or arrays


def _one_split(splits: datasets.DatasetDict, split: str | None) -> datasets.Dataset:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        what = "the data set has several splits" if split is None else f"split={split!r} is not in the data set"
        raise DataError(f"{what}: there are {', '.join(splits)}. Name one of them with split= (--split).")
    return splits[split]


def _empty(dataset: Any) -> DataError:
    name = repr(os.fspath(dataset)) if isinstance(dataset, str | os.PathLike) else f"(a {type(dataset).__name__})"
    return DataError(
        f"the data set {name} is empty: it has 0 rows. Give rows of the model's task; calibration and evaluation need "
        "at least one."
    )


def _load(name: str, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    path = Path(name)
    kind = _FORMATS.get(path.suffix.lower())
    if kind is not None:
        if not path.is_file():
            raise DataError(f"the data file {name!r} does not exist. Check the path.")
        if split not in (None, "train"):
            raise DataError(f"split={split!r} is not in {name!r}: a file has no splits. Leave split= (--split) out.")
        if not path.stat().st_size:
            raise _empty(name)
    elif path.is_file():
        raise DataError(
            f"the data file {name!r} is of no kind that can be read: its name must end in {', '.join(_FORMATS)}. "
            "Convert it, or rename it."
        )
    try:
        with _only_our_message():
            if kind is not None:
                return one_question_a_row(datasets.load_dataset(kind, data_files=name, split="train"))
            if path.is_dir():
                if _is_image_folder(path):
                    return datasets.load_dataset("imagefolder", data_dir=name)
                return datasets.load_from_disk(name)
            return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        if kind is not None and "corresponds to no data" in str(error):
            raise _empty(name) from error
        raise DataError(
            f"the data set {name!r} cannot be read: {reason(error)}. "
            "Give a json, jsonl, csv or parquet file, a folder of images or one written by save_to_disk, or a Hub id."
        ) from error


def _is_image_folder(path: Path) -> bool:
    """Tells whether a folder holds image files, perhaps in a folder for each class, and no saved data set."""
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return False
    return any(file.suffix.lower() in Image.registered_extensions() for file in path.rglob("*"))


@contextmanager
def _only_our_message() -> Iterator[None]:
    """Keeps datasets from logging an error that is about to be raised as well."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def sample_rows(rows: datasets.Dataset, num_samples: int, seed: int) -> datasets.Dataset:
    """Draws `num_samples` rows without repetition, or returns all where there are not more."""
    if len(rows) <= num_samples:
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows.select(sorted(order[:num_samples].tolist()))


def make_batches(
    rows: datasets.Dataset,
    task: Task,
    processor: Any,
    model: PreTrainedModel,
    batch_size: int,
    first: int = 0,
    step: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Makes batches of rows of similar length, which need the least padding.

    Batches come one at a time, for a whole test set may not fit in memory.

    Args:
        rows: The rows; the same rows always make the same batches.
        task: The task that encodes them.
        processor: The task's tokenizer or image processor.
        model: The model that takes the batches.
        batch_size: Rows that are encoded together: one batch, or a few where the model sees a row in several pieces.
        first: Index of the first group of rows that is encoded.
        step: Every `step`-th group is encoded from `first` on: one process's share.

    Raises:
        DataError: The rows do not have the task's columns, or hold values it cannot use.
    """
    for group in row_groups(rows, task, model, batch_size, first, step):
        yield from task.batches(group, processor, model)


def row_groups(
    rows: datasets.Dataset, task: Task, model: PreTrainedModel, size: int, first: int = 0, step: int = 1
) -> Iterator[list[Row]]:
    """Groups rows of similar length, with labels as the model numbers them; each row keeps its number (`ROW_NUMBER`).

    Raises:
        DataError: The rows do not have the task's columns, or labels that the model does not know.
    """
    rows = task.columns_of(rows)
    label_ids: dict[str, list[int]] = {}
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):  # the task decodes images, and can say which one is broken
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.ClassLabel) and task.has_label_names and column in task.target_columns:
            label_ids[column] = model_labels(column, feature.names, model)
    # A sample or a split remembers which rows of the user's data set it consists of.
    numbers = range(len(rows)) if rows._indices is None else rows._indices.column(0).to_pylist()

    def row_at(index: int) -> dict[str, Any]:
        row = {**rows[index], ROW_NUMBER: numbers[index]}
        for column, ids in label_ids.items():
            if isinstance(row[column], int) and 0 <= row[column] < len(ids):
                row[column] = ids[row[column]]
        return row

    order = list(range(len(rows)))
    if task.length(row_at(0)) is not None:
        lengths = [task.length(row_at(index)) for index in order]
        order.sort(key=lambda index: lengths[index] or 0)
    for start in range(first * size, len(order), step * size):
        yield [row_at(index) for index in order[start : start + size]]


def ready_batches(dataset: Any) -> list[Batch] | None:
    """Returns the batches of a data set that already is an iterable of tensors; None for rows.

    Raises:
        DataError: The data set is a DataLoader that gives no batch.
    """
    if isinstance(dataset, DataLoader):
        batches = list(dataset)
        if not batches:
            raise DataError("the data set is empty: the DataLoader gives no batch. Give at least one.")
        return batches
    if isinstance(dataset, Sequence) and not isinstance(dataset, str) and dataset and _holds_tensors(dataset[0]):
        return list(dataset)
    return None


def _holds_tensors(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        return any(isinstance(value, Tensor) and value.ndim for value in batch.values())
    return isinstance(batch, tuple | list) and any(isinstance(value, Tensor) for value in batch)


def with_own_targets(model: PreTrainedModel, batches: Iterable[Batch], task_name: str | None = None) -> list[Batch]:
    """Adds the model's own predictions as labels to unlabelled batches, with one forward pass over these.

    Args:
        model: The model that predicts.
        batches: Mappings that lack every argument the model takes as a label are labelled; other batches are returned
            unchanged.
        task_name: The model's task; None: by the model's class.

    Raises:
        DataError: A batch has no labels, and the task's predictions cannot stand in for them.
    """
    device = model_device(model)
    # "labels", or "start_positions" and "end_positions"
    label_names = set(find_labels(type(model)))  # type: ignore[no-untyped-call]
    labelled = []
    for batch in batches:
        if isinstance(batch, Mapping) and label_names and label_names.isdisjoint(batch):
            task = _predicting_task(model, task_name, batch)
            with torch.no_grad():
                targets = task.own_targets(batch, model(**to_device(batch, device)))
            batch = {**batch, **{name: value.cpu() for name, value in targets.items()}}
        labelled.append(batch)
    return labelled


def _predicting_task(model: PreTrainedModel, name: str | None, batch: Mapping[str, Any]) -> Task:
    try:
        return task_of(model, name)
    except ConfigurationError as error:
        raise DataError(
            f'the batches have no "labels" (found {", ".join(batch)}), and nothing can stand in for them: '
            f"{type(model).__name__} does none of the tasks {', '.join(TASKS)}. "
            'Add "labels" to every batch.'
        ) from error


def calibration_batches(model: PreTrainedModel, rows: Rows) -> list[Batch]:
    """Makes the calibration batches: the user's ready batches, or rows encoded by the model's task.

    Raises:
        DataError: The rows cannot be used.
        ConfigurationError: The task is not known.
    """
    batches = ready_batches(rows.dataset)
    if batches is None:
        return batches_of_rows(model, load_rows(rows.dataset, rows.split), rows)
    return with_own_targets(model, batches, rows.task)


def batches_of_rows(model: PreTrainedModel, dataset: datasets.Dataset, rows: Rows) -> list[Batch]:
    """Makes calibration batches of `num_samples` rows of a data set."""
    task = task_of(model, rows.task)
    processor = processor_of(model, rows, task)
    chosen = sample_rows(dataset, rows.num_samples, rows.seed)
    batches = list(make_batches(chosen, task, processor, model, rows.batch_size))
    return with_own_targets(model, batches, rows.task)


def processor_of(model: PreTrainedModel, rows: Rows, task: Task) -> Any:
    """Finds the tokenizer or image processor: the one in `rows`, or else the one saved with the model."""
    return rows.processor if rows.processor is not None else task.load_processor(str(model.name_or_path))
