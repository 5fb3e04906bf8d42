"""Makes the tables of certificate.json that recipes/README.md shows."""

from typing import Any

_BOUNDS = ("Student's t", "bootstrap BCa", "bootstrap-t", "Hall", "Hall, worst row twice (ours)")
_TESTS = ("exact (ours)", "score test, normal", "Wald")
_MARGIN = 0.005
_WALKS = ("300 rows, 0 good plans", "300 rows, 4 good plans", "1000 rows, 0 good plans", "1000 rows, 4 good plans")


def summary(report: dict[str, Any]) -> str:
    """Wrong passes of single tests, then of walks, then both on real losses; all in per cent."""
    return "\n".join([_levels(report), _proportions(report), _walks(report), _real(report)])


def _levels(report: dict[str, Any]) -> str:
    rows = [
        [name, *(" / ".join(_percent(by_rows[f"{n} rows"][bound]) for n in (300, 1000)) for bound in _BOUNDS)]
        for name, by_rows in report["levels"]["wrong passes"].items()
    ]
    return _table(["wrong passes of a bound of the mean, 300 / 1,000 rows", *_BOUNDS], rows)


def _proportions(report: dict[str, Any]) -> str:
    rows = [
        [f"{n:,}", *(_percent(report["proportions"][f"{n} rows, margin {_MARGIN}"][test]) for test in _TESTS)]
        for n in (100, 200, 500, 1000)
    ]
    return _table([f"rows (wrong passes of a test of the accuracy, margin {_MARGIN})", *_TESTS], rows)


def _walks(report: dict[str, Any]) -> str:
    rows = [
        [name, *(_percent(found[walk]["wrong walks"]) for walk in _WALKS)]
        for name, found in report["walks"]["by distribution"].items()
    ]
    return _table(["wrong walks", *_WALKS], rows)


def _real(report: dict[str, Any]) -> str:
    rows = []
    for name, found in report["real"].items():
        wrong = " / ".join(_percent(found[f"{n} rows, wrong"]["wrong walks"]) for n in (300, 1000, 3000))
        passes = [
            " / ".join(_percent(found[f"{n} rows, {what} passes"]) for n in (1000, 3000, 10_000))
            for what in ("loss", "accuracy")
        ]
        rows.append([name, _percent(found["changed answers"]), wrong, *passes, f"{found['rows required']:,}"])
    headings = [
        "model",
        "changed answers",
        "wrong passes, 300 / 1,000 / 3,000 rows",
        "no true change: loss passes, 1,000 / 3,000 / 10,000 rows",
        "accuracy passes",
        "rows that the verdict asks for",
    ]
    return _table(headings, rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
