"""The names of the run times, and which one a model takes.

| run time | for                                                                                      |
|----------|------------------------------------------------------------------------------------------|
| "auto"   | quicker where that is safe: what moves the outputs by less than compression did by far   |
| "fast"   | the quickest way for each layer                                                          |
| "small"  | the least memory: weights are made at each call, in floating point                       |
| "exact"  | floating point with the very weights that are saved; quicker only where that costs no bit|
"""

import os
from collections.abc import Mapping
from typing import Literal, get_args

from hf_lossless.errors import ConfigurationError

Runtime = Literal["auto", "fast", "small", "exact"]

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)

VARIABLE = "HF_LOSSLESS_RUNTIME"
"""The environment variable that names the run time of models that are loaded.

An argument of from_pretrained cannot: transformers hands those of a configuration that is passed beside a saved one on
for a list of its own classes only, and drops ours. `hf_lossless.optimize` changes it for a loaded model."""


def checked_runtime(name: object, where: str = "runtime") -> Runtime:
    """Returns the name of a run time, once it is checked.

    Args:
        name: What was given.
        where: Where it was given, for the error.

    Raises:
        ConfigurationError: There is no such run time.
    """
    for runtime in RUNTIMES:
        if name == runtime:
            return runtime
    raise ConfigurationError(f"{where}={name!r} is unknown. Choose one of {', '.join(RUNTIMES)}.")


def runtime_of_load(certified: str | None, environment: Mapping[str, str] = os.environ) -> Runtime:
    """Chooses the run time of a model that is being loaded.

    Args:
        certified: The one that its certificate was measured with; None: it has no certificate.
        environment: Where `VARIABLE` may be set; it goes first.

    Raises:
        ConfigurationError: The variable names no run time.

    Example:
        >>> runtime_of_load("exact", {}), runtime_of_load(None, {}), runtime_of_load("exact", {VARIABLE: "fast"})
        ('exact', 'auto', 'fast')
    """
    if environment.get(VARIABLE):
        return checked_runtime(environment[VARIABLE], VARIABLE)
    return "auto" if certified is None else checked_runtime(certified, "the runtime of the certificate")
