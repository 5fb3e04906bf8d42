"""Image classification: ImageNet, CIFAR, Fashion-MNIST and the like."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from hf_lossless.errors import DataError, reason
from hf_lossless.tasks.base import Row, class_labels, find_column
from hf_lossless.tasks.classification import Classification

_IMAGES = ("image", "img", "pixel_values")


class ImageClassification(Classification):
    """One image to one label."""

    name = "image-classification"
    head = "ForImageClassification"

    def load_model(self, model: str, **kwargs: Any) -> PreTrainedModel:
        """The model with a classification head."""
        loaded: PreTrainedModel = AutoModelForImageClassification.from_pretrained(model, **kwargs)
        return loaded

    def load_processor(self, model: str) -> Any:
        """Its image processor, in the version that needs only Pillow."""
        return AutoImageProcessor.from_pretrained(model, backend="pil")  # type: ignore[no-untyped-call]

    def length(self, row: Row) -> None:
        """All images cost the same."""

    def encode(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> dict[str, Tensor]:
        """Pixel values as the image processor makes them."""
        column = find_column(rows[0], _IMAGES, "image")
        images = [_as_image(row[column], column) for row in rows]
        encoded = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
        labels = class_labels(rows, model)
        if labels is not None:
            encoded["labels"] = labels
        return encoded


def _as_image(value: Any, column: str) -> Image.Image:
    """An RGB image from an image, a path, or the {"bytes", "path"} of a parquet file."""
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
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is the address of a Python object
        why = "Pillow knows no such format" if unknown else reason(error)
        raise DataError(
            f"the image {name} in column {column!r} cannot be decoded: {why}. Remove that row, or mend its image."
        ) from error
    raise DataError(
        f"the column {column!r} holds {type(value).__name__} where an image is expected. "
        "Give PIL images, paths, or a parquet file with an image column."
    )


def _decode(value: Mapping[str, Any]) -> Image.Image:
    """By datasets' own decoder, which turns a photograph the right way up."""
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is not None and os.path.isfile(path):
        content = Path(path).read_bytes()  # the decoder leaves the file of a broken image open
    image: Image.Image = datasets.Image().decode_example({"bytes": content, "path": path})
    return image
