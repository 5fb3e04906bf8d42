"""Maps class labels, names or numbers of a data set, to the model's own numbers.

A name is safe: it is looked up in the model's config (label2id), whatever its case. A number is used unchanged,
although models number the same labels differently: MNLI's "entailment" is 0 in GLUE and 2 in roberta-large-mnli.
Columns that carry their names (a ClassLabel of datasets) count as names; see `model_labels`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lossless.data.tasks.columns import LABEL_COLUMNS, Row, name_of
from hf_lossless.errors import ConfigurationError, DataError


def class_labels(rows: Sequence[Row], model: PreTrainedModel) -> Tensor | None:
    """Returns the class indices of rows, [rows], or None where the rows have no label column.

    A label is an index below the model's number of labels, or one of its label names.

    Raises:
        DataError: A label is neither an index nor a name of the model's labels.
        ConfigurationError: The model does not choose one label of several.
    """
    num_labels = int(model.config.num_labels or 0)
    problem_type = getattr(model.config, "problem_type", None)
    if num_labels < 2 or problem_type not in (None, "single_label_classification"):
        raise ConfigurationError(
            f"{type(model).__name__} does not choose one label of several (num_labels={num_labels}, "
            f"problem_type={problem_type!r}): regression and several labels at once are not among the tasks here. "
            "Give ready batches with the labels that the model expects as dataset."
        )
    column = next((name for name in LABEL_COLUMNS if name in rows[0]), None)
    if column is None:
        return None
    known = _known(model)
    return torch.tensor([_label(row, column, num_labels, known) for row in rows])


def _label(row: Row, column: str, num_labels: int, known: dict[str, int]) -> int:
    given = row[column]
    label: Any = known.get(given.lower(), given) if isinstance(given, str) else given
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < num_labels:
        return label
    hidden = " -1 stands for a hidden label, as in GLUE's test splits: take a split with labels." if label == -1 else ""
    raise DataError(
        f"the label {given!r} in column {column!r} is not one of the model's {num_labels} labels "
        f"(0 to {num_labels - 1}, or {', '.join(list(known)[:10])}), in {name_of(row)}.{hidden} "
        "Use the data that the model was trained for, or drop rows without a label."
    )


def _known(model: PreTrainedModel) -> dict[str, int]:
    return {str(name).lower(): int(index) for name, index in (model.config.label2id or {}).items()}


def model_labels(column: str, names: list[str], model: PreTrainedModel) -> list[int]:
    """Maps the label names of a column to the model's indices: data and model may number them differently.

    Where the model knows none of the names (it has LABEL_0 and the like), the data set's numbers are used.

    Raises:
        DataError: The model knows some of the names, but not all.
    """
    known = _known(model)
    missing = [name for name in names if name.lower() not in known]
    if not missing:
        return [known[name.lower()] for name in names]
    if len(missing) == len(names):
        return list(range(len(names)))
    raise DataError(
        f"the labels {missing} of column {column!r} are not among the model's ({', '.join(known)}), "
        "though others are. Rename or drop them, or give labels as the model's numbers."
    )
