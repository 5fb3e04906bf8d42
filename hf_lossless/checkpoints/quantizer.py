"""The plug-in: what `from_pretrained` and `save_pretrained` call.

A first load calibrates and compresses after the weights are there; a reload puts empty compressed modules in place
while the model is still on meta, so that the saved tensors load into them and a full-precision model never exists.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer

from hf_lossless.certification.certificate import Certificate
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.checkpoints.guards import check_files, guard_names, state_dict_with_guards
from hf_lossless.checkpoints.names import (
    compute_in_float32,
    decode_layers,
    forget_compressed_ties,
    is_saved_class,
    name_in_model,
    plan_of,
    plans_for,
    restore_scales,
    with_present_bytes,
)
from hf_lossless.checkpoints.saved_folder import refuse_other_bytes, tensor_sizes
from hf_lossless.errors import CheckpointError, ConfigurationError
from hf_lossless.storage.apply import apply_plan
from hf_lossless.storage.modules.base import compressed_layers
from hf_lossless.storage.modules.coded import CodedModule
from hf_lossless.storage.plan import QUANT_METHOD, CompressionPlan
from hf_lossless.storage.runtime.optimize import optimize
from hf_lossless.storage.runtime.runtimes import runtime_of_load

if TYPE_CHECKING:
    from hf_lossless.compression import CompressionResult


class LosslessHfQuantizer(HfQuantizer):
    """Compresses a model that is being loaded, or loads one that is compressed.

    Attributes:
        result: After a first load, what `compress` gave; None after a reload.
    """

    quantization_config: Any  # a LosslessCompressionConfig before compression, a LosslessCheckpointConfig afterwards
    requires_calibration = False  # True would refuse every model that is not compressed yet

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.result: CompressionResult | None = None
        self._original_bytes: int | None = None
        if not self.pre_quantized:
            from hf_lossless.config import LosslessCompressionConfig  # it loads all that compressing needs

            if not isinstance(quantization_config, LosslessCompressionConfig):
                raise ConfigurationError(
                    f"quantization_config is a {type(quantization_config).__name__}. "
                    "Pass a LosslessCompressionConfig with a dataset."
                )

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses disk offload: a layer whose weight is on disk can be neither calibrated nor unpacked."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigurationError(
                f"device_map sends {[name for name, place in device_map.items() if place == 'disk']} to disk. "
                "Compressed layers must be in memory: give a device_map without 'disk'."
            )
        config = self.quantization_config
        if not self.pre_quantized and config.dataset is None:
            raise ConfigurationError(
                "no dataset was given. Calibration needs rows of the model's task: "
                "LosslessCompressionConfig(dataset=...)."
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            self._original_bytes = _bytes_on_disk(model, checkpoint_files or ())
            return model
        saved_layers = self.quantization_config.plan.layers
        apply_plan(model, plans_for(model, saved_layers))
        forget_compressed_ties(model)
        compute_in_float32(model)
        # Transformers knows a guard by the name it had when saved, which may have a prefix that this model has not.
        saved_guards = {f"{name}.weight" for name, layer_plan in saved_layers.items() if layer_plan.kind != "kept"}
        guards = {f"^{re.escape(name)}$" for name in guard_names(model) | saved_guards}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | guards
        if checkpoint_files:
            check_files(
                checkpoint_files,
                model,
                name_in_model(model),
                complete=is_saved_class(model),
                ties=model.all_tied_weights_keys,
                unsaved=model._keys_to_ignore_on_save or (),
            )
            if is_saved_class(model):
                refuse_other_bytes(self.quantization_config.plan, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Saved under the model's own names. The older names that some architectures keep on disk may join weights that
        # are modules here (Nomic BERT's q, k and v), and codes of different widths cannot be joined.
        model._weight_conversions = []  # type: ignore[assignment]  # a plain attribute
        if self.pre_quantized:
            _refuse_unloaded(model)
            restore_scales(model)
            decode_layers(model)
            saved = self.quantization_config.certificate
            # A certificate speaks of the model that was saved, and not of a part of it (AutoModel of a classifier's).
            certificate = self.quantization_config.certificate if is_saved_class(model) else None
            self._describe(model, plan_of(model, self.quantization_config.plan), certificate)
            if compressed_layers(model):
                optimize(model, runtime_of_load(None if saved is None else saved.provenance.runtime))
            for module in _coded_modules(model):
                module.forget_bytes()  # saving makes them again
            return model
        _refuse_meta(model)
        from hf_lossless.certified_search import compress_pretrained

        self.result = compress_pretrained(model, self.quantization_config, original_bytes=self._original_bytes)
        forget_compressed_ties(model)
        self._describe(model, self.result.plan, self.result.certificate)
        return model

    def _describe(self, model: PreTrainedModel, plan: CompressionPlan, certificate: Certificate | None) -> None:
        self.quantization_config = model.config.quantization_config = LosslessCheckpointConfig.of(plan, certificate)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the model's tensors and the guards; the plan counts their bytes."""
        forgotten = [module for module in _coded_modules(model) if not len(module.coded)]
        for module in forgotten:
            module.recode()
        present = with_present_bytes(model, self.quantization_config.plan)
        self._describe(model, present, self.quantization_config.certificate)
        tensors = state_dict_with_guards(model)
        for module in forgotten:
            module.forget_bytes()
        return tensors, {}

    def is_serializable(self) -> bool:
        """Yes: codes, scales, zeros and factors are plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: gradients flow through the unpacked weights to what is left in floating point, and to adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Yes, or else transformers' Trainer would refuse the model even for `evaluate()`. Codes are never trained."""
        return True


def _coded_modules(model: PreTrainedModel) -> list[CodedModule]:
    return [module for module in model.modules() if isinstance(module, CodedModule)]


def _bytes_on_disk(model: PreTrainedModel, files: Sequence[str]) -> int | None:
    """Bytes of a model's tensors in the checkpoint's own dtype, which may not be the one it is loaded in.

    None where the checkpoint is not in safetensors files, or does not hold all of the model (a new head).
    """
    if not files or not all(file.endswith(".safetensors") for file in files):
        return None
    expected = model.state_dict()
    rename = name_in_model(model)
    # Several tensors on disk may be parts of one in the model (Mixtral's experts), so names can come twice.
    stored = [(rename(name), size) for name, size in tensor_sizes(files).items()]
    found = {name for name, _ in stored}
    ties = model.all_tied_weights_keys
    if any(name not in found and ties.get(name) not in found for name in expected):
        return None
    return sum(size for name, size in stored if name in expected)


def _refuse_unloaded(model: PreTrainedModel) -> None:
    """A tensor that no file held is there, with garbage in it: transformers only warns."""
    for name, module in compressed_layers(model).items():
        for part, tensor in module.weight_tensors.items():
            if not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"the tensor '{name}.{part}' was not loaded. Take the folder again from where it came from."
                )


def _refuse_meta(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigurationError(
                f"the parameter {name!r} is offloaded, so it cannot be calibrated. "
                "Give a device_map that keeps the whole model on its devices, or a machine with more memory."
            )


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a second registration, on reload, would raise
    register_quantizer(QUANT_METHOD)(LosslessHfQuantizer)
