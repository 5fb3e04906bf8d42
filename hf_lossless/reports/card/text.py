"""Makes parts of a card's text: tables in Markdown, the list of unchecked properties, loading code."""

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
"""File names that reveal a folder's tokenizer or processor, and the class that loads it."""


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Makes a table in Markdown; bars inside cells are escaped.

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
    """Makes the layers' table of `hf-lossless inspect` in Markdown."""
    columns = layer_columns(plan)
    rows = [[name, *(cell(layer) for cell in columns.values())] for name, layer in plan.layers.items()]
    return markdown_table(["layer", *columns], rows)


def storage_table(plan: CompressionPlan) -> str:
    """Makes a table of the ways to store layers, narrowest first, with counts and bytes, and of all other tensors."""
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
    """Lists what was not checked: a report's limitations, and what a reader might take for granted."""
    training = [] if entry.certificate is None else [_TRAINING]
    return [*limitations(entry, record), *training, *_TAKEN_FOR_GRANTED]


def task_name(architecture: str) -> str | None:
    """Finds the Hub's name of the task of a model class; None where it has none."""
    try:
        return task_of_class(architecture).name
    except ConfigurationError:
        tasks: dict[str, Any] = TASK_MAPPING
        for name, classes in tasks.items():
            if any(architecture in (known if isinstance(known, tuple) else (known,)) for known in classes.values()):
                return name
        return None


def install_command(plan: CompressionPlan) -> str:
    """Makes the command that installs all that loading a checkpoint with this plan needs.

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
        architecture: Name of the saved class.
        plan: The checkpoint's plan, which determines the extras that loading needs.
        files: Names of the files beside config.json, among them those of a tokenizer or processor.
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
"""The alternative text of each picture."""


def card_pictures(plan: CompressionPlan, record: CompressionRecord | None) -> dict[str, bytes]:
    """Draws the pictures of a compression as PNG by file name; without a record there is no frontier.

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
