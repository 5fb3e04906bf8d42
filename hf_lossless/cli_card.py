"""`hf-lossless card`: README.md for a folder."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_lossless.reports.card.details import CardDetails, details_of_card
from hf_lossless.reports.card.folder import write_card


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    base_model: Annotated[
        str | None, typer.Option(help="The original's Hub id or folder; its card gives licence and language.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data set that the rows are from.")] = None,
    split: Annotated[str | None, typer.Option(help="Its split that the certificate's rows are from.")] = None,
    license: Annotated[str | None, typer.Option(help="The Hub's name of the licence, say apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="A language's code; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write to; default: DIR.")] = None,
) -> None:
    """Write a model card; one that was changed by hand is never overwritten."""
    details = CardDetails(
        base_model=base_model,
        dataset=dataset,
        split=split,
        license=license,
        language=tuple(language) if language else None,
    )
    path = write_card(folder, details, out=out)
    console = Console()
    console.print(f"{path}: written", soft_wrap=True, highlight=False)
    if details_of_card(path.read_text(encoding="utf-8")).license is None:
        console.print(
            "It names no licence: give --license, or a --base-model whose card has one and can be read.",
            soft_wrap=True,
            highlight=False,
        )
