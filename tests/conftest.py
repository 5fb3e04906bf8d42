import os
import tempfile

# Both are read when the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"  # a lookup on the Hub fails at once
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="hf-lossless-tests-")

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
from compressed_folder import certificate, save_compressed
from fast_lane import is_fast
from huggingface_hub import constants
from loopback_hub import TOKEN, LoopbackHub
from tiny_checkpoints import image_rows, save_image_model, save_text_model, text_rows

from hf_lossless.cli import main as cli

torch.set_num_threads(1)  # tiny models spend more on waking threads than on arithmetic


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_fast(item.nodeid):
            item.add_marker(pytest.mark.fast)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture
def assets() -> Path:
    """The folder of real models and data, where the environment names one; see recipes/README.md."""
    folder = os.environ.get("HF_LOSSLESS_ASSETS")
    if not folder:
        pytest.skip("needs real models and data: HF_LOSSLESS_ASSETS names no folder of them")
    assert Path(folder).is_dir(), f"HF_LOSSLESS_ASSETS={folder} is no folder"
    return Path(folder)


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


@pytest.fixture(scope="session")
def compressed_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certified tiny text classifier with its tokenizer; not to be written to."""
    return save_compressed(
        text_folder, tmp_path_factory.mktemp("compressed") / "my-model-small", certified=certificate()
    )


@pytest.fixture
def small_folder(compressed_folder: Path, tmp_path: Path) -> Path:
    """A copy of it, to be written to."""
    return shutil.copytree(compressed_folder, tmp_path / "my-model-small")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """The Hub that huggingface_hub's client talks to in this process."""
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go by LFS
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, for the Hub of that time
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
        yield hub


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `hf-lossless ARGUMENTS`; its status, and what it writes to stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-lossless", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        printed = capsys.readouterr()
        return int(exit.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def output_of(run: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs `hf-lossless ARGUMENTS`, which must end well, and gives what it writes to stdout."""

    def output_of(*arguments: object) -> str:
        status, said, complaint = run(*arguments)
        assert status == 0, complaint
        return said

    return output_of
