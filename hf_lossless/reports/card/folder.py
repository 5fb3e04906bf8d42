"""The model card of a folder: rendered text, a person's own text, and its pictures."""

from dataclasses import dataclass
from pathlib import Path

from hf_lossless.checkpoints.files import write_file
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.errors import CheckpointError
from hf_lossless.reports.card.details import CardDetails, details_of_card
from hf_lossless.reports.card.digest import own_text, reconciled
from hf_lossless.reports.card.model_card import model_card
from hf_lossless.reports.card.text import card_pictures

CARD = "README.md"


@dataclass(frozen=True)
class FolderCard:
    """A card's text, and its pictures by file name."""

    text: str
    pictures: dict[str, bytes]


def folder_card(
    folder: Path,
    details: CardDetails,
    *,
    present: str | None,
    repo_id: str | None = None,
    token: str | None = None,
) -> FolderCard:
    """Renders the card of a folder.

    Args:
        folder: A folder with a compressed checkpoint.
        details: Details that the checkpoint does not contain.
        present: The existing card; its details fill those that `details` lacks.
        repo_id: As for `model_card`.
        token: As for `model_card`.

    Raises:
        CheckpointError: As for `model_card`; or compression.json is malformed or of another plan.
        ConfigurationError: The details cannot be used.
    """
    if present is not None and own_text(present) is not None:
        details = details.filled_from(details_of_card(present))
    text = str(model_card(folder, details, repo_id=repo_id, token=token))
    saved = SavedFolder.read(folder)
    return FolderCard(text, card_pictures(saved.plan, saved.record))


def write_card(folder: Path, details: CardDetails, *, out: Path | None = None, token: str | None = None) -> Path:
    """Writes README.md and its pictures.

    A person's text below the digest line of an existing card is kept, and the details in its front matter fill those
    that `details` lacks.

    Args:
        folder: A folder with a compressed checkpoint.
        details: Details that the checkpoint does not contain.
        out: The folder to write to; None: the same.
        token: Token for a base model that is not public.

    Returns:
        The card's path.

    Raises:
        CheckpointError: As for `folder_card`; or a person wrote or changed the existing card.
        ConfigurationError: The details cannot be used.
    """
    path = (out or folder) / CARD
    present = card_text(path.parent)
    card = folder_card(folder, details, present=present, token=token)
    text = reconciled(card.text, present)
    if text is None:
        raise CheckpointError(
            f"{path} was written or changed by hand, and stays as it is. Move it away to have a new one, or put your "
            "own text below the line that says so."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in card.pictures.items():
        (path.parent / name).write_bytes(picture)
    write_file(path, text)
    return path


def card_text(folder: Path) -> str | None:
    """Reads the card in a folder; None where there is none."""
    path = folder / CARD
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else None
