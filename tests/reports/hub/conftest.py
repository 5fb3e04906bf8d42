from pathlib import Path
from typing import Any

import pytest

from hf_lossless.reports.card import folder as cards_folder
from hf_lossless.reports.card import text as cards_text

DRAWN: dict[str, dict[str, bytes]] = {}


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of one plan are drawn once for all tests here: they would take most of their time."""

    def card_pictures(*given: Any) -> dict[str, bytes]:
        key = repr(given)
        DRAWN[key] = DRAWN.get(key) or cards_text.card_pictures(*given)
        return DRAWN[key]

    monkeypatch.setattr(cards_folder, "card_pictures", card_pictures)


@pytest.fixture
def folder(small_folder: Path) -> Path:
    return small_folder
