"""recipes/README.md: its tables are those of the committed figures and of the scripts."""

import json
import re
from pathlib import Path

import activations
import certificate_tables
import compare
import core
import low_rank
import pytest
from limit_parts import summary as limit_tables
from readme import README, with_part

RECIPES = README.parent
TEXT = README.read_text(encoding="utf-8")
PARTS = {  # marker: the script that writes between, and what it writes
    "compare": ("compare", compare.summary),
    "certificate": ("certificate", certificate_tables.summary),
    "limit": ("information_limit", limit_tables.summary),
    "low rank": ("low_rank", low_rank.summary),
    "activations": ("activations", activations.summary),
    "planning": ("core", core.planning),
    "running": ("core", core.running),
}


def scripts(folder: Path) -> dict[str, str]:
    """The sources of the files that can be run, by name."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    return {name: source for name, source in sources.items() if '__name__ == "__main__"' in source}


def rows(column: str) -> dict[str, str]:
    """The rows of the table whose first column has this heading, by the file that each begins with."""
    [body] = re.findall(rf"^\| {re.escape(column)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return {re.match(r"\| `([\w.]+)`", line)[1]: line for line in body.splitlines()}


@pytest.mark.parametrize("part", PARTS)
def test_the_tables_are_those_of_the_committed_figures(part: str) -> None:
    script, summary = PARTS[part]
    report = json.loads((RECIPES / f"benchmarks/{script}.json").read_text(encoding="utf-8"))
    assert with_part(TEXT, part, summary(report)) == TEXT


def test_every_part_is_known() -> None:
    assert re.findall(r"^<!-- ([a-z ]+) -->$", TEXT, re.MULTILINE) == list(PARTS)


def test_the_table_of_recipes_lists_each_with_its_checkpoint_and_data() -> None:
    listed, found = rows("recipe"), scripts(RECIPES)
    assert listed.keys() == found.keys()
    for name, source in found.items():
        for what in (r'model="(.+?)"', r'data=\("(.+?)"'):
            assert f"`{re.search(what, source)[1]}`" in listed[name]


def test_the_table_of_benchmarks_lists_each_with_what_it_wrote() -> None:
    benchmarks = RECIPES / "benchmarks"
    listed = rows("script in `benchmarks/`")
    assert listed.keys() == scripts(benchmarks).keys()
    written = {path.name for kind in ("json", "md", "png") for path in benchmarks.glob(f"*.{kind}")}
    kept = "".join(line for line in listed.values() if "not kept here" not in line)
    assert set(re.findall(r"`(\w+\.(?:json|md|png))`", kept)) == written
