"""Where commands print: a console of the screen's present width, and JSON."""

import json
from typing import Any

from rich.console import Console


def console() -> Console:
    """Makes a console for standard output as it is now."""
    return Console()


def print_json(values: dict[str, Any]) -> None:
    """Prints values as JSON, for other programs."""
    print(json.dumps(values, indent=2))
