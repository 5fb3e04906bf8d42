"""Generated text and a person's: what is recognised, and what is kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lossless.reports.card.digest import own_text, reconciled, with_digest

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"))


@given(TEXT, TEXT)
def test_round_trip(generated: str, own: str) -> None:
    card = with_digest(generated, own)
    assert card.startswith(generated.rstrip("\n"))
    assert own_text(card) == own.strip()
    assert own_text(card.replace("\n", "\r\n")) == own.strip()


@given(TEXT.filter(bool), st.data())
def test_any_change_above_the_digest_line_is_seen(generated: str, data: st.DataObject) -> None:
    card = with_digest(f"x{generated}")
    above = card.index("<!-- hf-lossless: the text above")
    place = data.draw(st.integers(0, above - 1))
    changed = card[:place] + ("q" if card[place] != "q" else "p") + card[place + 1 :]
    assert own_text(changed) is None


def test_a_card_without_a_digest_line_is_a_persons() -> None:
    assert own_text("# Mine\n") is None
    assert own_text("") is None
    assert own_text(with_digest("generated").replace("(sha256 ", "(sha256 0")) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (with_digest("new"), None, with_digest("new")),
        (with_digest("new"), with_digest("old"), with_digest("new")),
        (with_digest("new"), with_digest("old", "theirs"), with_digest("new", "theirs")),
        (with_digest("new", "ours"), with_digest("old"), with_digest("new", "ours")),
        (with_digest("new", "ours"), with_digest("old", "theirs"), with_digest("new", "theirs")),
        (with_digest("new"), with_digest("old").replace("old", "edited"), None),
        (with_digest("new"), "by hand", None),
        ("by hand", None, "by hand"),
        ("by hand", "by hand", "by hand"),
        ("by hand", with_digest("old"), "by hand"),
        ("by hand", with_digest("old", "theirs"), None),
        ("by hand", "by another hand", None),
    ],
    ids=[
        "nothing-there",
        "generated",
        "text-below",
        "text-here",
        "text-on-both-sides",
        "changed",
        "by-hand-there",
        "by-hand-here",
        "the-same-by-hand",
        "by-hand-here-generated-there",
        "by-hand-here-text-below-there",
        "by-hand-on-both-sides",
    ],
)
def test_reconciled(ours: str, theirs: str | None, expected: str | None) -> None:
    assert reconciled(ours, theirs) == expected
