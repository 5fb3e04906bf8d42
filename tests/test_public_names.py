"""The public names, and the examples in docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import hf_lossless

MODULES = ["hf_lossless", *(f"{module.name}" for module in pkgutil.walk_packages(hf_lossless.__path__, "hf_lossless."))]


def test_all_is_what_is_public() -> None:
    assert all(hasattr(hf_lossless, name) for name in hf_lossless.__all__)
    assert hf_lossless.__all__ == sorted(set(hf_lossless.__all__))
    assert set(hf_lossless._PLACE_OF) == set(hf_lossless.__all__) <= set(dir(hf_lossless))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hf_lossless.nothing


def test_every_error_is_public() -> None:
    errors = {
        name
        for name, value in vars(importlib.import_module("hf_lossless.errors")).items()
        if isinstance(value, type) and issubclass(value, hf_lossless.LosslessError)
    }
    assert errors <= set(hf_lossless.__all__)
    drawn = importlib.import_module("hf_lossless.errors").__doc__
    assert all(name in drawn for name in errors)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        ("ConfigurationError", ValueError),
        ("DataError", ValueError),
        ("CalibrationError", RuntimeError),
        ("UnreachableTargetError", ValueError),
        ("PlanError", ValueError),
        ("CheckpointError", OSError),
        ("HubError", OSError),
    ],
)
def test_an_error_is_also_the_built_in_one(error: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(hf_lossless, error), builtin)
    assert issubclass(getattr(hf_lossless, error), hf_lossless.LosslessError)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests() -> None:
    """Else the test above would pass for want of any."""
    finder = doctest.DocTestFinder()
    examples = [
        test
        for name in MODULES
        if not name.endswith("__main__")
        for test in finder.find(importlib.import_module(name))
        if test.examples
    ]
    assert len(examples) >= 5
