"""The command `export`: a compressed checkpoint in a format that stock transformers loads."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_lossless.checkpoints.exports.convert import largest_move
from hf_lossless.checkpoints.exports.export import FORMATS, ExportResult, by_reason, export

_console = Console()


def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    format: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist, or be empty.")],
    allow_dense: Annotated[
        bool,
        typer.Option(
            "--allow-dense", help="Keep in floating point what the format cannot carry, quantised inputs too."
        ),
    ] = False,
) -> None:
    """Write a compressed checkpoint in a format that transformers loads without hf_lossless."""
    result = export(folder, out, format, allow_dense=allow_dense)
    for line in _lines(folder, out, result):
        _console.print(line, soft_wrap=True, highlight=False, markup=False)


def _lines(folder: Path, out: Path, result: ExportResult) -> list[str]:
    """What was done, one statement a line."""
    total = len(result.carried) + len(result.dense)
    others = ", the others in floating point:" if result.dense else ""
    lines = [
        f"{out}: {result.size_bytes:,} bytes, format {result.format}; {folder}: {result.compressed_bytes:,} bytes",
        f"{len(result.carried)} of {total} compressed layers carried{others}",
        *(f"  {why}: {', '.join(names)}" for why, names in by_reason(result.dense).items()),
    ]
    if result.rounded:
        lines.append(
            f"the scales of {len(result.rounded)} layers are rounded to {result.dtype}: "
            f"their weights move by at most {largest_move(result.dtype):.2%} of their size"
        )
    if result.float_inputs:
        lines.append(
            f"{out} is another model than {folder}: {len(result.float_inputs)} layers have quantised inputs there, "
            "and none here"
        )
    if result.certified:
        lines.append(f"the certificate stays with {folder}, of which it speaks; judge {out} with: hf-lossless evaluate")
    return lines
