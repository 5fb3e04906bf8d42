"""Finds the folder of real models and data that the benchmarks read.

It is given by `--assets DIR` or the environment variable HF_LOSSLESS_ASSETS; what lies in it is listed in
recipes/README.md.
"""

import argparse
import os
from pathlib import Path

VARIABLE = "HF_LOSSLESS_ASSETS"


def add_assets_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--assets DIR` to a script's options; its default is the environment variable."""
    parser.add_argument(
        "--assets",
        type=_folder,
        default=os.environ.get(VARIABLE) or None,
        metavar="DIR",
        help=f"folder of models and data; default: the environment variable {VARIABLE}",
    )


def assets_folder(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Path:
    """Returns the folder that was given; ends the script with a usage error where none was."""
    if arguments.assets is None:
        parser.error(
            "this needs real models and data, and no folder of them was given. Give --assets DIR, or set "
            f"{VARIABLE}=DIR; recipes/README.md says what the folder holds."
        )
    folder: Path = arguments.assets
    return folder


def _folder(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {name!r}; check the path, or {VARIABLE} if that gave it")
    return path
