"""What tests of pushes have in common."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from loopback_hub import USER, LoopbackHub
from tiny_checkpoints import text_rows
from transformers import AutoModelForSequenceClassification

from hf_lossless import (
    LosslessCompressionConfig,
)
from hf_lossless.checkpoints.saved_folder import SavedFolder

REPO = f"{USER}/small"
WEIGHTS = "model.safetensors"
Run = Callable[..., tuple[int, str, str]]


def card_of(hub: LoopbackHub, revision: str = "main") -> str:
    return hub.files(REPO, revision)["README.md"].decode()


def other_weights(folder: Path, text_folder: Path) -> None:
    """Another plan of the same model in the folder's place."""
    shutil.rmtree(folder)
    config = LosslessCompressionConfig(text_rows(), ratio=3)
    model = AutoModelForSequenceClassification.from_pretrained(text_folder, quantization_config=config)
    model.save_pretrained(folder)


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uploads_of_weights(hub: LoopbackHub, folder: Path) -> list[str]:
    return hub.asked(rf"^PUT /large/{sha256(folder / WEIGHTS)}$")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ratio(folder: Path) -> str:
    entry = SavedFolder.read(folder).entry
    return f"{entry.plan.original_bytes / entry.size_bytes:.2f}"
