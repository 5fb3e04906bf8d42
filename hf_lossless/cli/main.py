"""The command line's entry point: registers all commands, and prints errors of the caller without a traceback."""

import sys
from importlib import metadata
from typing import Annotated

import typer
from rich.console import Console

from hf_lossless.cli import judging, making, publish
from hf_lossless.errors import LosslessError

app = typer.Typer(
    help="Loss-preserving compression of Hugging Face checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    making.compress,
    judging.certify,
    judging.evaluate,
    judging.inspect,
    publish.card,
    publish.report,
    publish.push,
    publish.export,
    judging.neighbourhood,
    making.demo,
):
    app.command()(_command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"hf-lossless {metadata.version('hf-lossless')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Loss-preserving compression of Hugging Face checkpoints."""


def main() -> None:
    """Runs a command: a caller's mistake ends with its message and status 1, without a traceback."""
    try:
        app()
    except (LosslessError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
