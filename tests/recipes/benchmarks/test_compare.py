"""The comparison's tables: what compare.md shows is what the committed figures say."""

import json
from pathlib import Path

import compare
import pytest

BENCHMARKS = Path(compare.__file__).parent
REPORT = json.loads((BENCHMARKS / "compare.json").read_text())


def test_the_file_of_tables_is_that_of_the_committed_figures():
    text = (BENCHMARKS / "compare.md").read_text()
    assert text == f"{compare.summary(REPORT)}\n{compare.peers_tables(REPORT)}"


def test_the_best_peer_reaches_the_ratio():
    rows = [
        {"peer": "large", "ratio": 4.0, "kl": 1e-5},
        {"peer": "middle", "ratio": 6.5, "kl": 1e-3},
        {"peer": "small", "ratio": 9.0, "kl": 1e-2},
        {"peer": "absent", "unavailable": "why"},
    ]
    best = [compare.best_peer(rows, ratio) for ratio in (4, 5, 8, 10)]
    assert [row and row["peer"] for row in best] == ["large", "middle", "small", None]


@pytest.mark.parametrize("name", REPORT["models"])
def test_every_row_keeps_to_its_ratio(name):
    """The bytes of a plan are at most the original's over the ratio that was asked."""
    model = REPORT["models"][name]
    for rows in model["plans"].values():
        for ratio, row in rows.items():
            assert "unreachable" in row or row["ratio"] >= float(ratio) - 1e-3
