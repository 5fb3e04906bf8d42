"""Puts the tables of a benchmark into recipes/README.md, between the markers <!-- NAME --> and <!-- /NAME -->."""

from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def with_part(text: str, name: str, part: str) -> str:
    """Returns the text with one part of it replaced."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}{part}{end}{after}"


def write_part(name: str, part: str) -> None:
    """Replaces one part of recipes/README.md."""
    README.write_text(with_part(README.read_text(encoding="utf-8"), name, part), encoding="utf-8")
