"""Options that several commands share, and the parsing of those that are lists.

Commands import what they need when they run, so that `--help` and `--version` are fast.
"""

from typing import Annotated, Literal

import typer

from hf_lossless.data.tasks.registry import TASKS
from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.runtime.runtimes import RUNTIMES

DATA = Annotated[str, typer.Option("--data", help="A json, jsonl, csv or parquet file, a saved dataset, or a Hub id.")]
SPLIT = Annotated[str | None, typer.Option("--split", help="Which split of a dataset that has several.")]
TASK = Annotated[str | None, typer.Option("--task", help=f"{' or '.join(TASKS)}; default: by the model's class.")]
CONFIDENCE_OPTION = Annotated[float, typer.Option("--confidence", help="Of the certificate, between 0 and 1.")]
METRIC_MARGIN_OPTION = Annotated[
    float, typer.Option("--metric-margin", help="How far the metric may fall, for the certificate.")
]
RUNTIME = Annotated[
    str | None,
    typer.Option("--runtime", help=f"How a compressed model is computed: {', '.join(RUNTIMES)}; default: as it loads."),
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def bit_widths(text: str) -> tuple[int, ...]:
    """Parses the widths of `--bits`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(
            f"--bits {text!r} is not a list of widths. Write for example --bits 2,3,4,8,16"
        ) from error


def activation_widths(text: str) -> tuple[int | None, ...]:
    """Parses the widths of `--activation-bits`; "none" stands for floating point."""
    try:
        return tuple(None if part.strip() == "none" else int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(
            f"--activation-bits {text!r} is not a list of widths. Write for example --activation-bits none,8"
        ) from error


def ranks_by_name(texts: list[str]) -> Literal["auto"] | dict[str, tuple[int, ...]] | None:
    """Parses all `--ranks` options together; None: no factors."""
    if texts == ["auto"]:
        return "auto"
    ranks: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, numbers = text.rpartition("=")
        try:
            given = tuple(int(part) for part in numbers.split(",")) if name else ()
        except ValueError:
            given = ()
        if not given:
            raise ConfigurationError(
                f"--ranks {text!r} is neither auto alone nor a layer with its ranks. "
                "Write for example --ranks auto, or --ranks classifier=8,16"
            )
        ranks[name] = (*ranks.get(name, ()), *given)
    return ranks or None
