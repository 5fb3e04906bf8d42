"""`hf-lossless report`: writes the HTML report of a saved folder."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lossless.checkpoints.files import write_file
from hf_lossless.errors import CheckpointError
from hf_lossless.reports.html import GENERATOR, html_report


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; an older report is replaced. Default: DIR/report.html.")
    ] = None,
) -> None:
    """Write all that a compressed checkpoint says of itself into one HTML file, with pictures."""
    out = folder / "report.html" if out is None else out
    _refuse_other_files(out)
    write_file(out, html_report(folder))
    print(f"{out}: {out.stat().st_size:,} bytes")


def _refuse_other_files(out: Path) -> None:
    """Raises CheckpointError where there is something that is no report."""
    if out.is_dir():
        raise CheckpointError(f"the output file {out} is a folder. Name a file in it, say {out / 'report.html'}.")
    if out.exists() and f'content="{GENERATOR}"'.encode() not in out.read_bytes()[:1000]:
        raise CheckpointError(f"the output file {out} exists and is no report of ours. Remove it, or name another one.")
