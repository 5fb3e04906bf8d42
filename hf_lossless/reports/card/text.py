"""Pieces of a card's text: tables in Markdown, what was not checked, how to load."""

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import transformers
from matplotlib.figure import Figure
from transformers.modelcard import TASK_MAPPING

from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.checkpoints.record import CompressionRecord
from hf_lossless.data.tasks.registry import task_of_class
from hf_lossless.errors import ConfigurationError
from hf_lossless.reports.pictures.frontier import frontier_figure
from hf_lossless.reports.pictures.layers import layers_figure
from hf_lossless.reports.tables import layer_columns
from hf_lossless.reports.words import limitations
from hf_lossless.storage.kinds import extras_of, stored_as
from hf_lossless.storage.plan import CompressionPlan

_TRAINING = "The original's training: whether it has seen some of these rows is not known."
_TAKEN_FOR_GRANTED = (
    "Other tasks, other languages, and other kinds of text or images than those of these rows.",
    "Robustness: noise, attacks, and data that drift.",
    "Generated text, where the model generates any.",
)

PROCESSORS = {
    "processor_config.json": "AutoProcessor",
    "tokenizer_config.json": "AutoTokenizer",
    "preprocessor_config.json": "AutoImageProcessor",
}
"""File names by which a folder shows what it holds beside the model, and the class that loads it."""


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""A table in Markdown; a bar in a cell does not end it.

    Example:
        >>> print(markdown_table(["a", "b"], [["1|2", "3"]]))
        | a | b |
        |---|---|
        | 1\|2 | 3 |
    """
    lines = [headings, *rows]
    first, *rest = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([first, "|" + "---|" * len(headings), *rest])


def layers_table(plan: CompressionPlan) -> str:
    """What `hf-lossless inspect` prints of the layers."""
    columns = layer_columns(plan)
    rows = [[name, *(cell(layer) for cell in columns.values())] for name, layer in plan.layers.items()]
    return markdown_table(["layer", *columns], rows)


def storage_table(plan: CompressionPlan) -> str:
    """How many layers are stored in which way, with their bytes: the narrowest first, and everything else."""
    count: dict[tuple[float, str], int] = defaultdict(int)
    total_bytes: dict[tuple[float, str], int] = defaultdict(int)
    for layer in plan.layers.values():
        key = (0.0 if layer.coded is not None else layer.bits, stored_as(layer))
        count[key] += 1
        total_bytes[key] += layer.cost_bytes
    rows = [(f"{key[1]}", f"{count[key]:,}", f"{total_bytes[key]:,}") for key in sorted(count)]
    return markdown_table(
        ("stored as", "layers", "bytes"), [*rows, ("biases, norms and all else", "", f"{plan.other_bytes:,}")]
    )


def not_checked(entry: LosslessCheckpointConfig, record: CompressionRecord | None) -> list[str]:
    """What nobody should read out of the card: all that a report says, and what a stranger may take for granted."""
    training = [] if entry.certificate is None else [_TRAINING]
    return [*limitations(entry, record), *training, *_TAKEN_FOR_GRANTED]


def task_name(architecture: str) -> str | None:
    """The Hub's name of the task that a model class does; None where it has none."""
    try:
        return task_of_class(architecture).name
    except ConfigurationError:
        tasks: dict[str, Any] = TASK_MAPPING
        for name, classes in tasks.items():
            if any(architecture in (known if isinstance(known, tuple) else (known,)) for known in classes.values()):
                return name
        return None


def install_command(plan: CompressionPlan) -> str:
    """The command that installs what loading a checkpoint with this plan takes.

    Example:
        >>> install_command(CompressionPlan(theory="llc", layers={}, other_bytes=0, original_bytes=8))
        'pip install hf-lossless'
    """
    extras = ",".join(extras_of(plan))
    return f"pip install 'hf-lossless[{extras}]'" if extras else "pip install hf-lossless"


def loading_code(name: str, architecture: str, files: Iterable[str], plan: CompressionPlan) -> str | None:
    """Writes the lines that load a checkpoint; None for a class that transformers does not have.

    Args:
        name: A repo id or a folder.
        architecture: The class that was saved.
        plan: Its plan, which tells the extras that loading takes.
        files: Names of the files beside config.json; they tell what else there is to load.
    """
    if not hasattr(transformers, architecture):
        return None
    there = set(files)
    processor = next((kind for file, kind in PROCESSORS.items() if file in there), None)
    lines = [
        f"import hf_lossless  # {install_command(plan)}; registers the plug-in with transformers",
        f"from transformers import {', '.join(sorted(filter(None, (architecture, processor))))}",
        "",
        f'model = {architecture}.from_pretrained("{name}")',
    ]
    if processor is not None:
        variable = "tokenizer" if processor == "AutoTokenizer" else "processor"
        lines.append(f'{variable} = {processor}.from_pretrained("{name}")')
    return "\n".join(lines)


LAYERS, FRONTIER = "layers.png", "frontier.png"

CAPTIONS = {
    LAYERS: "How each layer is stored: bits of a weight, and ranks where there are any",
    FRONTIER: "The best plan for every size: predicted change of the loss, and that of the chosen one as measured on "
    "the calibration rows",
}
"""What is said of each picture to those who do not see it."""


def card_pictures(plan: CompressionPlan, record: CompressionRecord | None) -> dict[str, bytes]:
    """The pictures that there are of a compression; without a record there is no frontier.

    Example:
        >>> from hf_lossless.storage.plan import Grid, LayerPlan
        >>> layer = LayerPlan(kind="grid", grid=Grid(bits=3), cost_bytes=9, predicted_loss_change=0.0)
        >>> plan = CompressionPlan(theory="llc", layers={"head": layer}, other_bytes=0, original_bytes=64)
        >>> {name: content[1:4] for name, content in card_pictures(plan, None).items()}
        {'layers.png': b'PNG'}
    """
    pictures = {LAYERS: _png(layers_figure(plan))}
    return pictures if record is None else {**pictures, FRONTIER: _png(frontier_figure(record))}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
