"""The plug-in that `from_pretrained` and `save_pretrained` call.

A first load calibrates and compresses after the weights are loaded; a reload puts empty compressed modules in place
while the model is still on meta, so that the saved tensors load into them and a full-precision model never exists.
"""

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer

from hf_lossless.certification.certificate import Certificate
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig, demand, meet_demand
from hf_lossless.checkpoints.guards import check_files, guard_names, state_dict_with_guards
from hf_lossless.checkpoints.names import (
    compute_in_float32,
    decode_layers,
    forget_compressed_ties,
    is_saved_class,
    name_in_model,
    plan_of,
    plan_of_part,
    plans_for,
    refuse_other_layers,
    resized_layers,
    restore_scales,
    with_present_bytes,
)
from hf_lossless.checkpoints.saved_folder import headers, refuse_other_bytes, tensor_sizes
from hf_lossless.errors import CheckpointError, ConfigurationError
from hf_lossless.storage.apply import apply_plan
from hf_lossless.storage.dense import make_dense
from hf_lossless.storage.modules.base import compressed_layers
from hf_lossless.storage.modules.coded import CodedModule
from hf_lossless.storage.plan import QUANT_METHOD, QUANT_METHODS, CompressionPlan, LayerPlan
from hf_lossless.storage.runtime.optimize import optimize
from hf_lossless.storage.runtime.runtimes import runtime_of_load

if TYPE_CHECKING:
    from hf_lossless.compression import CompressionResult


class LosslessHfQuantizer(HfQuantizer):
    """Compresses a model while it is loaded, or loads a compressed one.

    Attributes:
        result: After a first load, the result of `compress`; None after a reload.
    """

    quantization_config: Any  # a LosslessCompressionConfig before compression, a LosslessCheckpointConfig afterwards
    requires_calibration = False  # True would refuse every model that is not yet compressed

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.result: CompressionResult | None = None
        self._original_bytes: int | None = None
        self._layers: dict[str, LayerPlan] = {}
        self._complete = True
        if not self.pre_quantized:
            from hf_lossless.config import LosslessCompressionConfig  # it imports everything that compressing needs

            if not isinstance(quantization_config, LosslessCompressionConfig):
                raise ConfigurationError(
                    f"quantization_config is a {type(quantization_config).__name__}. "
                    "Pass a LosslessCompressionConfig with a dataset."
                )

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses disk offload, because a layer whose weight is on disk can be neither calibrated nor unpacked."""
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

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Removes the demand for this package before transformers reads it; attention is not changed."""
        meet_demand(config)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not self.pre_quantized:
            self._original_bytes = _bytes_on_disk(model, checkpoint_files or ())
            return model
        plan = self.quantization_config.plan
        files = checkpoint_files or []
        # Files with as many bytes as the plan says are those that were saved; where a model differs, it is another
        # model.
        as_saved = bool(files) and sum(tensor_sizes(files).values()) == plan.tensor_bytes
        self._layers = plans_for(model, plan.layers)
        saved_shapes = {name: shape for file in files if as_saved for name, _, shape in headers(file)}
        resized = resized_layers(model, self._layers, saved_shapes) if as_saved else set()
        self._layers = {name: layer_plan for name, layer_plan in self._layers.items() if name not in resized}
        self._complete = is_saved_class(model) and not resized
        apply_plan(model, self._layers)
        forget_compressed_ties(model)
        compute_in_float32(model)
        # Transformers knows a guard by its saved name, which may have a prefix that this model lacks.
        saved_guards = {f"{name}.weight" for name, layer_plan in plan.layers.items() if layer_plan.kind != "kept"}
        guards = {f"^{re.escape(name)}$" for name in guard_names(model) | saved_guards}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | guards
        if files:
            check_files(
                files,
                model,
                name_in_model(model),
                complete=is_saved_class(model),
                as_saved=as_saved,
                resized=resized,
                ties=model.all_tied_weights_keys,
                unsaved=model._keys_to_ignore_on_save or (),
            )
            if is_saved_class(model):
                refuse_other_bytes(plan, files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            _refuse_unloaded(model)
            restore_scales(model)
            decode_layers(model)
            saved = self.quantization_config.certificate
            # A certificate holds for the model that was saved, not for a part of it (AutoModel of a classifier's).
            certificate = saved if self._complete else None
            plan = plan_of(model, self.quantization_config.plan, self._layers, complete=self._complete)
            self.attach(model, plan, certificate)
            if compressed_layers(model):
                optimize(model, runtime_of_load(None if saved is None else saved.provenance.runtime))
            for module in _coded_modules(model):
                module.forget_bytes()  # saving encodes them again
            return model
        _refuse_meta(model)
        from hf_lossless.certified_search import compress_pretrained

        self.result = compress_pretrained(model, self.quantization_config, original_bytes=self._original_bytes)
        self.attach(model, self.result.plan, self.result.certificate)
        return model

    @classmethod
    def attach_result(cls, result: "CompressionResult") -> None:
        """Attaches quantizers to the model that `compress` compressed, or to the models of transformers inside it."""
        _own_configs(result.model)
        if not isinstance(result.model, PreTrainedModel):
            cls._attach_to_parts(result.model, result.plan)
            return
        quantizer = cls(LosslessCheckpointConfig.of(result.plan, result.certificate), pre_quantized=True)
        quantizer.attach(result.model, result.plan, result.certificate)
        # As after a first load, the model was not loaded compressed, and its result is known.
        quantizer.result, quantizer.pre_quantized = result, False

    def attach(self, model: PreTrainedModel, plan: CompressionPlan, certificate: Certificate | None) -> None:
        """Attaches a quantizer to a compressed model and to its parts that are models, so that each can be saved.

        A part has a quantizer of its own, with its share of the plan and without a certificate, which holds for the
        whole model only. Both often share one config; it describes what was saved last.
        """
        forget_compressed_ties(model)
        self._attach_to_parts(model, plan)
        self._describe(model, plan, certificate)

    @classmethod
    def _attach_to_parts(cls, model: nn.Module, plan: CompressionPlan) -> None:
        parts = [(name, part) for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel)]
        for name, part in reversed(parts):  # of two that share a config, the outer one is described last
            part_plan = plan_of_part(part, name, plan)
            if part_plan.layers:
                forget_compressed_ties(part)
                cls(LosslessCheckpointConfig.of(part_plan), pre_quantized=True)._describe(part, part_plan, None)

    def _describe(self, model: PreTrainedModel, plan: CompressionPlan, certificate: Certificate | None) -> None:
        self.quantization_config = model.config.quantization_config = LosslessCheckpointConfig.of(plan, certificate)
        demand(model.config)
        attributes: Any = model  # transformers sets these from outside too
        attributes.hf_quantizer = self
        attributes.is_quantized = True
        attributes.quantization_method = QUANT_METHOD
        # Tensors are saved under the model's own names. The older names that some architectures keep on disk may join
        # weights that are separate modules here (Nomic BERT's q, k and v), and codes of different widths cannot be
        # joined.
        attributes._weight_conversions = []

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors that `save_pretrained` writes: the model's, and the guards; updates the plan's bytes.

        Raises:
            CheckpointError: The model differs from its plan.
        """
        if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter is saved
            return dict(model.state_dict()), {}
        plan = self.quantization_config.plan
        refuse_other_layers(model, plan)
        freed = [module for module in _coded_modules(model) if not len(module.coded)]
        for module in freed:
            module.recode()
        self._describe(model, with_present_bytes(model, plan), self.quantization_config.certificate)
        tensors = state_dict_with_guards(model)
        for module in freed:
            module.forget_bytes()
        return tensors, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Replaces every compressed layer by a plain one; `model.dequantize()` then removes the plan."""
        for part in model.modules():
            if part is not model and isinstance(part, PreTrainedModel) and hasattr(part, "hf_quantizer"):
                self.remove_quantization_config(part)
        make_dense(model)
        meet_demand(model.config)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):  # the class's ties hold again: see `forget_compressed_ties`
                vars(part).pop("_tied_weights_keys", None)
                part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)
        for_all: Any = model  # its `to` is wrapped, and typed by none
        dense: PreTrainedModel = for_all.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return dense

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Removes the plan from a model that is dense again; its weights are saved under transformers' own names."""
        super().remove_quantization_config(model)  # type: ignore[no-untyped-call]
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions

    def is_serializable(self) -> bool:
        """Returns True: codes, scales, zeros and factors are plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Returns True: gradients flow through unpacked weights to floating-point parameters and to adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Returns True, because transformers' Trainer would else refuse even `evaluate()`. Codes are never trained."""
        return True


def _own_configs(model: nn.Module) -> None:
    """Copies the configs of a model, so that other models built from them do not get its plan."""
    copied: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            if id(config) not in copied:
                copy.deepcopy(config, copied)  # also records the copies of the configs inside it
            module.config = copied[id(config)]


def _coded_modules(model: PreTrainedModel) -> list[CodedModule]:
    return [module for module in model.modules() if isinstance(module, CodedModule)]


def _bytes_on_disk(model: PreTrainedModel, files: Sequence[str]) -> int | None:
    """Computes the bytes of a model's tensors in the checkpoint's dtype, which may differ from the loaded one.

    Returns None where the checkpoint is not in safetensors files, or does not hold all of the model (a new head).
    """
    if not files or not all(file.endswith(".safetensors") for file in files):
        return None
    expected = model.state_dict()
    rename = name_in_model(model)
    # Several tensors on disk may be parts of one in the model (Mixtral's experts), so names can repeat.
    stored = [(rename(name), size) for name, size in tensor_sizes(files).items()]
    found = {name for name, _ in stored}
    ties = model.all_tied_weights_keys
    if any(name not in found and ties.get(name) not in found for name in expected):
        return None
    return sum(size for name, size in stored if name in expected)


def _refuse_unloaded(model: PreTrainedModel) -> None:
    """Raises CheckpointError for tensors that no file held, which are uninitialised: transformers only warns."""
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


for _method in QUANT_METHODS:
    if _method not in AUTO_QUANTIZER_MAPPING:  # a second registration, on reload, would raise
        register_quantizer(_method)(LosslessHfQuantizer)
