"""`pytest -m fast` touches every room of the package, and names no test that is not there."""

import re
from pathlib import Path

import pytest
from fast_lane import SLOW_FILES, is_fast

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "hf_lossless"
PLACES = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"]
ROOMS = sorted(
    {path.stem for path in PLACES if (TESTS / path.stem).is_dir() or (TESTS / f"test_{path.stem}.py").exists()}
)


def names_in(path: Path) -> list[str]:
    """The names of a file's tests."""
    return re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_rooms_are_found() -> None:
    assert len(ROOMS) > 10 and {"storage", "config"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_fast_tests(room: str) -> None:
    files = [*(TESTS / room).rglob("test_*.py"), *TESTS.glob(f"test_{room}.py")]
    nodes = [f"tests/{path.relative_to(TESTS).as_posix()}::{name}" for path in files for name in names_in(path)]
    assert any(is_fast(node) for node in nodes)


@pytest.mark.parametrize("path", SLOW_FILES)
def test_what_is_named_is_there(path: str) -> None:
    names = names_in(TESTS / path)
    for beginning in SLOW_FILES[path]:
        assert any(name.startswith(beginning.partition("[")[0]) for name in names), beginning


def test_the_marker_is_put_on(request: pytest.FixtureRequest) -> None:
    marked = {item.nodeid for item in request.session.items if item.get_closest_marker("fast")}
    assert request.node.nodeid in marked
    assert marked == {item.nodeid for item in request.session.items if is_fast(item.nodeid)}
