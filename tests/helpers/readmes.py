"""The READMEs: their texts by path, and the snippets that they show."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PATHS = [
    ROOT / "README.md",
    *(path for room in ("hf_lossless", "model_cards", "recipes") for path in sorted((ROOT / room).rglob("README.md"))),
]
READMES = {path: path.read_text(encoding="utf-8") for path in _PATHS}
PACKAGE = {path: text for path, text in READMES.items() if path.parent == ROOT or ROOT / "hf_lossless" in path.parents}
"""Those whose snippets are run: at the top, and in the rooms."""


def snippets() -> list[tuple[str, str]]:
    """Every fenced block of Python or shell with the marker above it, `<!-- marker -->`; "" where there is none."""
    pattern = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(?:python|bash)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [(match[1] or "", match[2]) for text in PACKAGE.values() for match in pattern.finditer(text)]


def blocks(marker: str) -> list[str]:
    """The fenced blocks after `<!-- marker -->`, of all READMEs of the package."""
    return [code for above, code in snippets() if above == marker]
