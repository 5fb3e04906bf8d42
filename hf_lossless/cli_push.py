"""`hf-lossless push`: a folder to the Hub."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_lossless.reports.card.text import PROCESSORS
from hf_lossless.reports.hub.push import push_to_hub


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
    done = push_to_hub(folder, repo, private=private, revision=revision, create_pr=create_pr, commit_message=message)
    console = Console()
    what = "pushed" if done.changed else "nothing had changed since"
    console.print(
        f"{done.repo_id}: {what}, {done.pull_request_url or done.commit_url}", soft_wrap=True, highlight=False
    )
    if done.card == "kept":
        console.print(
            "README.md there was written or changed by hand, and stays as it is: see whether it still speaks of this "
            "model. Delete it there and push again to have the one from here.",
            soft_wrap=True,
            highlight=False,
        )
    if not any((folder / name).is_file() for name in PROCESSORS):
        console.print(
            f"{folder} has no tokenizer or image processor, so none was pushed. Save it there, and push again.",
            soft_wrap=True,
            highlight=False,
        )
