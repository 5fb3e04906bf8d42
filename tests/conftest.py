import os
import tempfile

# Both are read when the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"  # a lookup on the Hub fails at once
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="hf-lossless-tests-")

import shutil
from pathlib import Path

import datasets
import pytest
import torch
from tiny_checkpoints import image_rows, save_image_model, save_text_model, text_rows

torch.set_num_threads(1)  # tiny models spend more on waking threads than on arithmetic


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text classifier with its tokenizer; not to be written to."""
    return save_text_model(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image classifier with its processor; not to be written to."""
    return save_image_model(tmp_path_factory.mktemp("image") / "model")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled texts."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    datasets.Dataset.from_list(text_rows()).to_json(path)
    return path


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled images."""
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    datasets.Dataset.from_list(image_rows()).to_parquet(path)
    return path
