"""Prints the output of commands: a console of the screen's current width, and JSON."""

import json
from typing import Any

from rich.console import Console


def console() -> Console:
    """Makes a console for the current standard output."""
    return Console()


def print_json(values: dict[str, Any]) -> None:
    """Prints values as JSON, for other programs."""
    print(json.dumps(values, indent=2))
