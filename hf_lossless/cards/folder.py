"""The card that belongs to a folder: what is new, what a person wrote there, and pictures beside it."""

import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_lossless.cards.details import CardDetails, details_of_card
from hf_lossless.cards.model_card import model_card
from hf_lossless.cards.seal import own_text, reconciled
from hf_lossless.checkpoint import write_file
from hf_lossless.errors import CheckpointError

CARD = "README.md"
CAPTIONS = {"layers.png": "Bits and rank of each layer", "frontier.png": "Plans: bytes against the change of the loss"}
"""Pictures that a card shows, in their order."""


def write_card(
    folder: Path,
    details: CardDetails,
    figures: Mapping[str, Figure],
    *,
    out: Path | None = None,
    token: str | None = None,
) -> Path:
    """Writes README.md and its pictures.

    What a person wrote below the seal of a card that is there is kept, and so are the details in its front matter,
    where `details` does not say otherwise.

    Args:
        folder: With a compressed checkpoint.
        details: What the card is to say beyond it.
        figures: Pictures by the names of their files, which are those of `CAPTIONS`.
        out: The folder to write to; None: the same.
        token: For a base model that is not public.

    Returns:
        The card's path.

    Raises:
        CheckpointError: As for `model_card`; or somebody changed the card that is there, or it is not ours.
        ConfigurationError: The details cannot be used.
    """
    path = (out or folder) / CARD
    present = card_text(path.parent)
    card = reconciled(fresh_card(folder, details, figures, present=present, token=token), present)
    if card is None:
        raise CheckpointError(
            f"{path} was written or changed by hand, and stays as it is. Move it away to have a new one, or put your "
            "own text below the line that says so."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (path.parent / name).write_bytes(png(figure))
    write_file(path, card)
    return path


def fresh_card(
    folder: Path,
    details: CardDetails,
    figures: Mapping[str, Figure],
    *,
    present: str | None,
    repo_id: str | None = None,
    token: str | None = None,
) -> str:
    """A new card for a folder, with the details of the one that is `present`, and with the pictures there are."""
    if present is not None and own_text(present) is not None:
        details = details.filled_from(details_of_card(present))
    pictures = {name: text for name, text in CAPTIONS.items() if name in figures or (folder / name).is_file()}
    return str(model_card(folder, details, repo_id=repo_id, pictures=pictures, token=token))


def card_text(folder: Path) -> str | None:
    """The card that lies in a folder."""
    path = folder / CARD
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else None


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
