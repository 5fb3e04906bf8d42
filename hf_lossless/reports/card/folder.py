"""The card that belongs to a folder: what is new, what a person wrote there, and pictures beside it."""

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
    """A card's text, and the pictures that it shows, by the names of their files."""

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
    """A new card for a folder.

    Args:
        folder: With a compressed checkpoint.
        details: What the card is to say beyond it.
        present: The card that is there; its details hold where `details` does not say otherwise.
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

    What a person wrote below the seal of a card that is there is kept, and so are the details in its front matter,
    where `details` does not say otherwise.

    Args:
        folder: With a compressed checkpoint.
        details: What the card is to say beyond it.
        out: The folder to write to; None: the same.
        token: For a base model that is not public.

    Returns:
        The card's path.

    Raises:
        CheckpointError: As for `folder_card`; or somebody changed the card that is there, or it is not ours.
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
    """The card that lies in a folder."""
    path = folder / CARD
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else None
