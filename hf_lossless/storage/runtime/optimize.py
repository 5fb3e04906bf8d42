"""`optimize`: gives every compressed layer of a loaded model the run-time form that is asked for."""

import functools
import logging

import torch
from torch import nn

from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.tied import TiedLinear
from hf_lossless.storage.runtime.choose import make_form
from hf_lossless.storage.runtime.int8_linear import int8_available
from hf_lossless.storage.runtime.runtimes import Runtime, checked_runtime

_logger = logging.getLogger(__name__)


def optimize(model: nn.Module, runtime: Runtime = "auto") -> nn.Module:
    """Makes a compressed model run another way, in place; from_pretrained has done so with "auto" already.

    Args:
        model: A compressed model, on any device. Layers on a GPU, or in another dtype than float32, are computed in
            floating point whatever is asked for.
        runtime: "auto", "fast", "small" or "exact" (see `storage.runtime.runtimes`).

    Returns:
        The model, in evaluation mode or not as it was.

    Raises:
        ConfigurationError: There is no such run time, or the model is not compressed.

    Example:
        >>> optimize(nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        hf_lossless.errors.ConfigurationError: this Linear has no compressed layer, so that there is nothing to \
optimize. Load a compressed checkpoint, or compress this model first.
    """
    runtime = checked_runtime(runtime)
    layers = [module for module in model.modules() if isinstance(module, CompressedModule)]
    if not layers:
        raise ConfigurationError(
            f"this {type(model).__name__} has no compressed layer, so that there is nothing to optimize. "
            "Load a compressed checkpoint, or compress this model first."
        )
    if runtime in ("auto", "fast") and not int8_available():
        _warn_of_missing_kernels(torch.__version__)
    heads = {module.home for module in model.modules() if isinstance(module, TiedLinear)}
    with torch.no_grad():
        for layer in layers:
            kind = "linear" if layer in heads else layer.kind
            layer.run_in(functools.partial(make_form, runtime, kind), runtime)
    return model


def runtime_of(model: nn.Module) -> Runtime | None:
    """Returns the run time that a model's compressed layers were given; None where there is none."""
    return next((module.runtime for module in model.modules() if isinstance(module, CompressedModule)), None)


@functools.cache
def _warn_of_missing_kernels(version: str) -> None:
    """Says once what the lack of kernels costs."""
    _logger.warning(
        "torch %s has no FBGEMM kernels on this processor: compressed layers run in floating point, "
        "1 to 2 times as long as the original's.",
        version,
    )
