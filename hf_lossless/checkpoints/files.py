"""Reads JSON files, and writes files and folders completely or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_lossless.errors import CheckpointError


def read_json(path: Path, remedy: str, malformed_remedy: str) -> Any:
    """Reads the values of a JSON file.

    Raises:
        CheckpointError: It cannot be read (the message ends with `remedy`), or is not JSON (with `malformed_remedy`).
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. {remedy}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}. {malformed_remedy}") from error


def write_file(path: Path, text: str) -> None:
    """Writes a file completely or not at all; an existing file is replaced atomically.

    Raises:
        CheckpointError: The parent folder does not exist, or the file may not be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)  # it still exists only after an error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}. Name another file.") from error


@contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `target` that is renamed to it on success, and removed on an error.

    Raises:
        CheckpointError: `target` exists and is not an empty folder.
    """
    target = Path(os.path.realpath(target))  # "." has no name for a temporary folder; a link stays a link
    refuse_occupied(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        refuse_occupied(target)  # it may have been created meanwhile
        temporary.chmod(0o755)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_occupied(target: str | os.PathLike[str]) -> None:
    """Raises CheckpointError where `target` is a file or a folder that is not empty, or cannot be written."""
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
