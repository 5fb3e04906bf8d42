"""Image classification: ImageNet, CIFAR, Fashion-MNIST and the like."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from hf_lossless.data.tasks.base import RowAnswers
from hf_lossless.data.tasks.classification import Classification
from hf_lossless.data.tasks.columns import Row, find_column, name_of
from hf_lossless.data.tasks.labels import class_labels
from hf_lossless.data.tasks.metrics import TopAccuracy
from hf_lossless.errors import DataError, reason

_IMAGES = ("image", "img", "pixel_values")


_TOP = 5


class ImageClassification(Classification):
    """The task of choosing one label for an image.

    With more than five classes the top-5 accuracy is reported as well; a certificate watches the (top-1) accuracy.
    """

    name = "image-classification"
    heads = ("ForImageClassification",)
    has_label_names = True
    auto_class = AutoModelForImageClassification

    def load_processor(self, model: str) -> Any:
        """Loads the model's image processor, in the version that needs only Pillow."""
        return AutoImageProcessor.from_pretrained(model, backend="pil")  # type: ignore[no-untyped-call]

    def input_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Finds the column of images."""
        return (find_column(names, _IMAGES, "image"),)

    def length(self, row: Row) -> None:
        """Returns None: all images are equally long."""

    def encode(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Encodes images as pixel values with the image processor."""
        [column] = self.input_columns(list(rows[0]))
        images = [_as_image(row, column) for row in rows]
        encoded = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
        labels = class_labels(rows, model)
        if labels is not None:
            encoded["labels"] = labels
        return encoded

    def metrics(self, answers: RowAnswers) -> dict[str, float]:
        """Computes the accuracy, and the top-5 accuracy where there are more than five classes."""
        found = super().metrics(answers)
        if answers.logits is not None and answers.logits.shape[-1] > _TOP:
            found |= TopAccuracy().of(answers.logits.topk(_TOP).indices.tolist(), answers.references)
        return found


def _as_image(row: Row, column: str) -> Image.Image:
    """Reads an RGB image from a PIL image, a path, or the {"bytes", "path"} of a parquet file."""
    value = row[column]
    if isinstance(value, str):
        value = {"path": value, "bytes": None}
    try:
        if isinstance(value, Image.Image):
            return value.convert("RGB")
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
            return _decode(value).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        content = value.get("bytes") or b"" if isinstance(value, Mapping) else b""
        name = (value.get("path") if isinstance(value, Mapping) else None) or f"that begins with {content[:16]!r}"
        unknown = isinstance(error, UnidentifiedImageError)  # its text is the address of a Python object
        why = "Pillow knows no such format" if unknown else reason(error)
        raise DataError(
            f"the image {name} in column {column!r} cannot be decoded, in {name_of(row)}: {why}. Remove that row, or "
            "mend its image."
        ) from error
    raise DataError(
        f"the column {column!r} holds {type(value).__name__} where an image is expected, in {name_of(row)}. "
        "Give PIL images, paths, or a parquet file with an image column."
    )


def _decode(value: Mapping[str, Any]) -> Image.Image:
    """Decodes an image with datasets' own decoder, which turns a photograph the right way up."""
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is not None and os.path.isfile(path):
        content = Path(path).read_bytes()  # the decoder leaves the file of a broken image open
    image: Image.Image = datasets.Image().decode_example({"bytes": content, "path": path})
    return image
