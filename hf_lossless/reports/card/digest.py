"""Marks the generated part of a card with its digest, so that a person's text and changes are recognised.

    generated text
    <!-- hf-lossless: the text above is generated (sha256 4f5c...); ... Write below this line. -->
    a person's text

The digest line holds the checksum of all text above it, front matter included. Where the checksum matches, nobody
changed that text: it may be rendered again, and the text below is kept. Where it does not match, or there is no digest
line, the card is a person's, and is not changed. Line endings are ignored, since web editors change them.
"""

import hashlib
import re

_DIGEST_LINE = re.compile(r"^<!-- hf-lossless: [^\n]*\(sha256 ([0-9a-f]{64})\)[^\n]*-->\n?", re.MULTILINE)
_SENTENCE = (
    "<!-- hf-lossless: the text above is generated (sha256 {digest}) and is made anew with the next card or push, "
    "unless somebody changes it. Write below this line: that is kept. -->\n"
)


def with_digest(generated: str, own: str = "") -> str:
    r"""Joins generated text, its digest line, and a person's own text to a card.

    Example:
        >>> card = with_digest("# Small\n", own="Ask me.")
        >>> own_text(card)
        'Ask me.'
        >>> own_text(card.replace("Small", "Tiny")) is None
        True
    """
    above = _lines(generated).rstrip("\n") + "\n\n"
    below = f"\n{own.strip()}\n" if own.strip() else ""
    return f"{above}{_SENTENCE.format(digest=_digest(above))}{below}"


def own_text(card: str) -> str | None:
    """Returns a person's text below the digest line; None where the generated part was changed, or is not ours."""
    text = _lines(card)
    found = _DIGEST_LINE.search(text)
    if found is None or _digest(text[: found.start()]) != found[1]:
        return None
    return text[found.end() :].strip()


def reconciled(ours: str, theirs: str | None) -> str | None:
    """Chooses the card to write where there may be one already.

    Args:
        ours: The new card, with a digest line or written by a person.
        theirs: The existing card; None: there is none.

    Returns:
        The new card, with the text below the existing card's digest line; None where the existing card is kept: a
        person changed it, or wrote below its digest line and the new card has no such line.
    """
    if theirs is None or theirs == ours:
        return ours
    own = own_text(theirs)
    if own is None:
        return None
    if not own:
        return ours
    return None if own_text(ours) is None else with_digest(_above(ours), own)


def _above(card: str) -> str:
    text = _lines(card)
    found = _DIGEST_LINE.search(text)
    assert found is not None
    return text[: found.start()]


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
