"""Whose text a card is: a generated part, the seal, and below it what a person wrote.

    generated text
    <!-- hf-lossless: the text above is generated (sha256 4f5c...); ... Write below this line. -->
    a person's text

The seal holds the checksum of all that is above it, front matter included. Where it still fits, nobody changed that
text, so it may be made anew, and what stands below is kept. Where it does not, or where there is no seal, the whole
card is a person's, and stays as it is. Ends of lines do not count: web editors change them.
"""

import hashlib
import re

_SEAL = re.compile(r"^<!-- hf-lossless: [^\n]*\(sha256 ([0-9a-f]{64})\)[^\n]*-->\n?", re.MULTILINE)
_SENTENCE = (
    "<!-- hf-lossless: the text above is generated (sha256 {digest}) and is made anew with the next card or push, "
    "unless somebody changes it. Write below this line: that is kept. -->\n"
)


def seal(generated: str, own: str = "") -> str:
    r"""A card: generated text, its seal, and a person's own text.

    Example:
        >>> card = seal("# Small\n", own="Ask me.")
        >>> own_text(card)
        'Ask me.'
        >>> own_text(card.replace("Small", "Tiny")) is None
        True
    """
    above = _lines(generated).rstrip("\n") + "\n\n"
    below = f"\n{own.strip()}\n" if own.strip() else ""
    return f"{above}{_SENTENCE.format(digest=_digest(above))}{below}"


def own_text(card: str) -> str | None:
    """What a person wrote below the seal; None where the generated part was changed, or is not ours."""
    text = _lines(card)
    found = _SEAL.search(text)
    if found is None or _digest(text[: found.start()]) != found[1]:
        return None
    return text[found.end() :].strip()


def reconciled(ours: str, theirs: str | None) -> str | None:
    """The card to write where there may be one already.

    Args:
        ours: The new card, sealed or a person's.
        theirs: The card that is there; None: there is none.

    Returns:
        The new card, with the text that stands below the seal of the other one; None where the other one stays as it
        is: a person changed it, or wrote below its seal and the new one has no place for that.
    """
    if theirs is None or theirs == ours:
        return ours
    own = own_text(theirs)
    if own is None:
        return None
    if not own:
        return ours
    return None if own_text(ours) is None else seal(_above(ours), own)


def _above(card: str) -> str:
    text = _lines(card)
    found = _SEAL.search(text)
    assert found is not None
    return text[: found.start()]


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
