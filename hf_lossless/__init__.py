"""Loss-preserving compression of Hugging Face checkpoints.

Importing the package registers it with transformers, so that `from_pretrained` compresses with a
`LosslessCompressionConfig` and loads what was compressed.
"""

from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.checkpoints.exports.export import ExportResult, export
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

__version__ = "0.1.0"

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
    "model_card",
    "push_to_hub",
]
