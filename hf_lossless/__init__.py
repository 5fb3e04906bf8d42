"""Loss-preserving compression of Hugging Face checkpoints.

Importing the package registers it with transformers, so that `from_pretrained` compresses with a
`LosslessCompressionConfig` and loads compressed checkpoints. Public names are imported when they are first used, so
that loading a compressed checkpoint does not import the libraries of compression, evaluation and drawing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
    from hf_lossless.checkpoints.exports.export import ExportResult, export
    from hf_lossless.checkpoints.module_file import load_module, save_module
    from hf_lossless.checkpoints.quantizer import LosslessHfQuantizer
    from hf_lossless.compression import CompressionResult, compress
    from hf_lossless.config import LosslessCompressionConfig
    from hf_lossless.errors import (
        CalibrationError,
        CheckpointError,
        ConfigurationError,
        DataError,
        HubError,
        LosslessError,
        PlanError,
        UnreachableTargetError,
    )
    from hf_lossless.reports.card.details import CardDetails
    from hf_lossless.reports.card.model_card import model_card
    from hf_lossless.reports.html import html_report
    from hf_lossless.reports.hub.push import PushResult, push_to_hub
    from hf_lossless.storage.apply import apply_plan
    from hf_lossless.storage.plan import CompressionPlan, Grid, LayerPlan
    from hf_lossless.storage.runtime.optimize import optimize

__version__ = "0.1.0"

_PLACES = {
    "checkpoints.entry": ["LosslessCheckpointConfig"],
    "checkpoints.exports.export": ["ExportResult", "export"],
    "checkpoints.module_file": ["load_module", "save_module"],
    "checkpoints.quantizer": ["LosslessHfQuantizer"],
    "compression": ["CompressionResult", "compress"],
    "config": ["LosslessCompressionConfig"],
    "errors": [
        *("CalibrationError", "CheckpointError", "ConfigurationError", "DataError"),
        *("HubError", "LosslessError", "PlanError", "UnreachableTargetError"),
    ],
    "reports.card.details": ["CardDetails"],
    "reports.card.model_card": ["model_card"],
    "reports.html": ["html_report"],
    "reports.hub.push": ["PushResult", "push_to_hub"],
    "storage.apply": ["apply_plan"],
    "storage.runtime.optimize": ["optimize"],
    "storage.plan": ["CompressionPlan", "Grid", "LayerPlan"],
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "CalibrationError",
    "CardDetails",
    "CheckpointError",
    "CompressionPlan",
    "CompressionResult",
    "ConfigurationError",
    "DataError",
    "ExportResult",
    "Grid",
    "HubError",
    "LayerPlan",
    "LosslessCheckpointConfig",
    "LosslessCompressionConfig",
    "LosslessError",
    "LosslessHfQuantizer",
    "PlanError",
    "PushResult",
    "UnreachableTargetError",
    "apply_plan",
    "compress",
    "export",
    "html_report",
    "load_module",
    "model_card",
    "optimize",
    "push_to_hub",
    "save_module",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register(_: Any) -> None:
    import_module("hf_lossless.checkpoints.quantizer")


# Registers once from_pretrained is imported, so that a process that loads no model does not import torch.
wrapt.register_post_import_hook(_register, "transformers.modeling_utils")


def _register_adapters(_: Any) -> None:
    import_module("hf_lossless.checkpoints.adapters")


wrapt.register_post_import_hook(_register_adapters, "peft.tuners.lora")
