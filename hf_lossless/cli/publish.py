"""Commands that publish a compressed checkpoint: `card`, `report`, `push`, `export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_lossless.checkpoints.exports import FORMATS
from hf_lossless.cli.screen import console
from hf_lossless.errors import CheckpointError

if TYPE_CHECKING:
    from hf_lossless.checkpoints.exports.export import ExportResult


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
    from hf_lossless.reports.card.details import CardDetails, details_of_card
    from hf_lossless.reports.card.folder import write_card

    details = CardDetails(
        base_model=base_model,
        dataset=dataset,
        split=split,
        license=license,
        language=tuple(language) if language else None,
    )
    path = write_card(folder, details, out=out)
    console().print(f"{path}: written", soft_wrap=True, highlight=False)
    if details_of_card(path.read_text(encoding="utf-8")).license is None:
        console().print(
            "It names no licence: give --license, or a --base-model whose card has one and can be read.",
            soft_wrap=True,
            highlight=False,
        )


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME; created where it is not there.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Whether it must be; default: as it is, or as its owner's default is."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch, made where it is not there; default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the commit as a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="The commit's first line.")] = None,
) -> None:
    """Push a compressed checkpoint and its card to the Hub, in one commit; the token is that of `hf auth login`."""
    from hf_lossless.reports.card.text import PROCESSORS
    from hf_lossless.reports.hub.push import push_to_hub

    done = push_to_hub(folder, repo, private=private, revision=revision, create_pr=create_pr, commit_message=message)
    what = "pushed" if done.changed else "nothing had changed since"
    console().print(
        f"{done.repo_id}: {what}, {done.pull_request_url or done.commit_url}", soft_wrap=True, highlight=False
    )
    if done.card == "kept":
        console().print(
            "README.md there was written or changed by hand, and stays as it is: see whether it still speaks of this "
            "model. Delete it there and push again to have the one from here.",
            soft_wrap=True,
            highlight=False,
        )
    if not any((folder / name).is_file() for name in PROCESSORS):
        console().print(
            f"{folder} has no tokenizer or image processor, so none was pushed. Save it there, and push again.",
            soft_wrap=True,
            highlight=False,
        )


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; an older report is replaced. Default: DIR/report.html.")
    ] = None,
) -> None:
    """Write all that a compressed checkpoint says of itself into one HTML file, with pictures."""
    from hf_lossless.checkpoints.files import write_file
    from hf_lossless.reports.html import html_report

    out = folder / "report.html" if out is None else out
    _refuse_other_files(out)
    write_file(out, html_report(folder))
    print(f"{out}: {out.stat().st_size:,} bytes")


def _refuse_other_files(out: Path) -> None:
    """Raises CheckpointError where the output file exists and is not a report."""
    from hf_lossless.reports.html import GENERATOR

    if out.is_dir():
        raise CheckpointError(f"the output file {out} is a folder. Name a file in it, say {out / 'report.html'}.")
    if out.exists() and f'content="{GENERATOR}"'.encode() not in out.read_bytes()[:1000]:
        raise CheckpointError(f"the output file {out} exists and is no report of ours. Remove it, or name another one.")


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    format: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist, or be empty.")],
    allow_dense: Annotated[
        bool,
        typer.Option("--allow-dense", help="Keep in floating point what the format cannot hold, quantised inputs too."),
    ] = False,
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", help="Of the format onnx: fast (the default), small or standard."),
    ] = None,
) -> None:
    """Write a compressed checkpoint in a format that needs no hf_lossless: transformers' own, or ONNX."""
    from hf_lossless.checkpoints.exports.export import export as write_export

    result = write_export(folder, out, format, allow_dense=allow_dense, runtime=runtime)
    for line in _lines(folder, out, result):
        console().print(line, soft_wrap=True, highlight=False, markup=False)


def _lines(folder: Path, out: Path, result: "ExportResult") -> list[str]:
    """Describes an export, one statement a line."""
    from hf_lossless.checkpoints.exports.convert import largest_move
    from hf_lossless.checkpoints.exports.export import by_reason

    total = len(result.converted) + len(result.dense)
    others = ", the others in floating point:" if result.dense else ""
    lines = [
        f"{out}: {result.size_bytes:,} bytes, format {result.format}; {folder}: {result.compressed_bytes:,} bytes",
        f"{len(result.converted)} of {total} compressed layers converted{others}",
        *(f"  {why}: {', '.join(names)}" for why, names in by_reason(result.dense).items()),
    ]
    if result.difference is not None:
        lines.append(
            f"run time {result.runtime}: on random inputs its outputs differ from the model's by "
            f"{result.difference:.1e} of their size"
        )
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
        judged = "" if result.format == "onnx" else f"; judge {out} with: hf-lossless evaluate"
        lines.append(f"the certificate stays with {folder}, of which it speaks{judged}")
    return lines
