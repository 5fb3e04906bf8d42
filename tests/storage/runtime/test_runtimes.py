"""Run times by name: what an argument, a certificate and the environment make of them."""

import logging

import pytest
from torch import nn

from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.runtime import choose, optimize
from hf_lossless.storage.runtime.runtimes import RUNTIMES, VARIABLE, checked_runtime, runtime_of_load


@pytest.mark.parametrize("name", RUNTIMES)
def test_each_name_is_one(name: str):
    assert checked_runtime(name) == name
    assert set(choose.WAYS) == set(RUNTIMES)


@pytest.mark.parametrize("name", ["quick", "", None, 3, ["auto"]], ids=str)
def test_others_are_refused(name: object):
    with pytest.raises(ConfigurationError, match=r"runtime=.* is unknown. Choose one of auto, fast, small, exact."):
        checked_runtime(name)


def test_the_environment_goes_before_the_certificate():
    assert runtime_of_load("exact", {VARIABLE: "fast"}) == "fast"
    assert runtime_of_load("exact", {VARIABLE: ""}) == "exact"
    assert runtime_of_load(None, {}) == "auto"
    with pytest.raises(ConfigurationError, match="HF_LOSSLESS_RUNTIME='quick' is unknown"):
        runtime_of_load(None, {VARIABLE: "quick"})


def test_nothing_to_optimize():
    with pytest.raises(ConfigurationError, match="this Linear has no compressed layer"):
        optimize.optimize(nn.Linear(2, 2))


def test_missing_kernels_are_said_once(monkeypatch, caplog):
    from test_int8_linear import layer_of

    optimize._warn_of_missing_kernels.cache_clear()
    for module in (choose, optimize):
        monkeypatch.setattr(module, "int8_available", lambda: False)
    layer = layer_of("coded")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            optimize.optimize(layer, "fast")
    assert layer.form is None
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "compressed layers run in floating point, 1 to 2 times as long as the original's."
    ]
