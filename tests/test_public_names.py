"""The public names."""

import importlib

import pytest

import hf_lossless


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
