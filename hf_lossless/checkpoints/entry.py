"""`LosslessCheckpointConfig`: the entry "quantization_config" in config.json of a compressed checkpoint.

It is a separate class from `LosslessCompressionConfig`, with which it shares only the method's name: transformers
refuses to load a checkpoint whose stored class differs from the class of the argument, and this stops a model from
being compressed twice.

Config.json also holds a demand, for users who load without this package. Transformers ignores an unknown quantisation
method with a line in its log, and with `ignore_mismatched_sizes=True` even the guards do not stop it from filling
layers with random weights. But it always refuses an unknown fusion of modules, before it builds a model, and names it
in the error: so the demand is written as the name of a fusion.
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lossless.certification.certificate import Certificate
from hf_lossless.errors import CheckpointError
from hf_lossless.storage.plan import FORMAT_VERSION, QUANT_METHOD, QUANT_METHODS, CompressionPlan, json_bytes

DEMAND = "hf_lossless (pip install hf-lossless, and import hf_lossless before from_pretrained)"
"""The name of the unknown fusion in the error of a transformers without this package."""

_REMEDY = "Take config.json again from where the checkpoint came from."


class LosslessCheckpointConfig(QuantizationConfigMixin):
    """Describes a compressed checkpoint, in config.json.

    Args:
        format_version: Version of the layout on disk.
        plan: The plan, as JSON values or as a `CompressionPlan`.
        quant_method: "hf_lossless"; "lossless" in older checkpoints.
        certificate: The certificate from held-out rows, as JSON values or as a `Certificate`; None: none was requested.

    The run time is not part of it, because transformers passes loading arguments on for its own classes only. Set the
    environment variable HF_LOSSLESS_RUNTIME, or call `hf_lossless.optimize` on the loaded model.

    Raises:
        CheckpointError: The format version is newer than this release or invalid, or the certificate is malformed.
        PlanError: The plan is malformed.
    """

    def __init__(
        self,
        format_version: Any = None,
        plan: Any = None,
        quant_method: str = QUANT_METHOD,
        certificate: Any = None,
    ) -> None:
        if type(format_version) is not int or format_version < 1:
            raise CheckpointError(f"format_version={format_version!r} in config.json is not a version. {_REMEDY}")
        if format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {format_version}, this release of hf_lossless reads up to "
                f"{FORMAT_VERSION}. Upgrade with: pip install --upgrade hf-lossless"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.plan = plan if isinstance(plan, CompressionPlan) else CompressionPlan.from_dict(plan)
        read = certificate is None or isinstance(certificate, Certificate)
        self.certificate: Certificate | None = certificate if read else Certificate.from_dict(certificate)

    @classmethod
    def of(cls, plan: CompressionPlan, certificate: Certificate | None = None) -> "LosslessCheckpointConfig":
        """Makes the entry of a checkpoint that this release writes, with this plan and certificate."""
        return cls(FORMAT_VERSION, plan, certificate=certificate)

    @property
    def size_bytes(self) -> int:
        """Computes the bytes of the whole checkpoint: all tensors, and this entry as config.json holds it."""
        return self.plan.tensor_bytes + json_bytes(self.to_dict())

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "LosslessCheckpointConfig | tuple[LosslessCheckpointConfig, dict[str, Any]]":
        """Reads the entry of config.json; the version is checked first, because newer formats may have other fields."""
        version = config_dict.get("format_version")
        newer = isinstance(version, int) and version > FORMAT_VERSION
        config = cls(version) if newer else cls(**_known(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON values of the entry in config.json."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "plan": self.plan.to_dict(),
            **({} if self.certificate is None else {"certificate": self.certificate.to_dict()}),
        }


def _known(config_dict: dict[str, Any]) -> dict[str, Any]:
    unknown = set(config_dict) - {"quant_method", "format_version", "plan", "certificate"}
    if unknown:
        raise CheckpointError(
            f"config.json has unknown entries under quantization_config: {sorted(unknown)}. {_REMEDY}"
        )
    return config_dict


def demand(config: PreTrainedConfig) -> None:
    """Adds the demand to a config: transformers without this package then refuses to load the model."""
    config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), DEMAND: True}


def meet_demand(config: PreTrainedConfig) -> None:
    """Removes the demand from a config; fusions that a user requested stay."""
    fusions = {name: value for name, value in (getattr(config, "fusion_config", None) or {}).items() if name != DEMAND}
    if fusions:
        config.fusion_config = fusions
    elif hasattr(config, "fusion_config"):
        del config.fusion_config


for _method in QUANT_METHODS:
    if _method not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a second registration, on reload, would raise
        register_quantization_config(_method)(LosslessCheckpointConfig)
