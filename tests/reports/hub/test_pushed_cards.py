"""Cards on the Hub that a person edits, or that other tools write."""

from pathlib import Path

import pytest
from compressed_folder import certificate, give_certificate
from loopback_hub import TOKEN, USER, LoopbackHub
from pushing import REPO, WEIGHTS, card_of, other_weights
from transformers import BertForSequenceClassification

from hf_lossless import (
    HubError,
    push_to_hub,
)
from hf_lossless.reports.card.digest import own_text


def test_what_is_written_below_the_digest_line_is_kept(folder: Path, text_folder: Path, hub: LoopbackHub) -> None:
    push_to_hub(folder, REPO)
    before = card_of(hub)
    edited = (before + "\n## Contact\n\nAsk me.\n").replace("\n", "\r\n")  # as web editors save it
    hub.write(REPO, "README.md", edited.encode())
    give_certificate(folder, certificate(rise=0.1))
    assert push_to_hub(folder, REPO).card == "written"
    assert own_text(card_of(hub)) == "## Contact\n\nAsk me."
    assert "\n## Certificate\n\nCertified." in before
    assert "\n## Certificate\n\nNot certified: the loss may have risen" in card_of(hub)


@pytest.mark.parametrize(
    ("old", "new"),
    [("Activations stay", "Activations always stay"), ("library_name: transformers", "license: mit")],
    ids=["text", "front-matter"],
)
def test_a_card_that_was_changed_stays(old: str, new: str, folder: Path, text_folder: Path, hub: LoopbackHub) -> None:
    push_to_hub(folder, REPO)
    edited = card_of(hub).replace(old, new, 1)
    assert edited != card_of(hub)
    hub.write(REPO, "README.md", edited.encode())
    other_weights(folder, text_folder)
    result = push_to_hub(folder, REPO)
    assert result.card == "kept" and result.changed
    assert card_of(hub) == edited
    assert hub.files(REPO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("content", [b"# Mine\n", b"", b"\xff\xfe no text"], ids=["plain", "empty", "binary"])
def test_a_card_of_somebody_else_stays(content: bytes, folder: Path, hub: LoopbackHub) -> None:
    hub.create(REPO, {"README.md": content})
    (folder / "README.md").write_text("# By hand, here\n")
    assert push_to_hub(folder, REPO).card == "kept"
    assert hub.files(REPO)["README.md"] == content


def test_a_card_that_was_written_by_hand_in_the_folder_is_pushed(folder: Path, hub: LoopbackHub) -> None:
    (folder / "README.md").write_text("# By hand\n")
    push_to_hub(folder, REPO)
    assert card_of(hub) == "# By hand\n"
    assert (folder / "README.md").read_text() == "# By hand\n"


def test_a_card_that_is_edited_while_a_push_is_under_way(folder: Path, hub: LoopbackHub) -> None:
    push_to_hub(folder, REPO)
    give_certificate(folder, certificate(rise=0.1))
    hub.before_commit = lambda: hub.write(REPO, "README.md", b"# Mine\n")
    with pytest.raises(HubError, match=rf"{REPO} changed while this push was under way \(412.*push again\."):
        push_to_hub(folder, REPO)
    assert card_of(hub) == "# Mine\n"
    hub.before_commit = lambda: None
    assert push_to_hub(folder, REPO).card == "kept"


def test_the_push_of_transformers_itself(folder: Path, hub: LoopbackHub) -> None:
    """It pushes what save_pretrained writes, and reads the card that is there and writes it again."""
    push_to_hub(folder, REPO)
    before = card_of(hub)
    model = BertForSequenceClassification.from_pretrained(folder)
    model.push_to_hub(REPO, token=TOKEN)
    assert hub.files(REPO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert card_of(hub) == before
    model.push_to_hub(f"{USER}/other", token=TOKEN)
    assert {WEIGHTS, "config.json"} <= hub.files(f"{USER}/other").keys()
