"""The plug-in: what `from_pretrained` and `save_pretrained` call.

A first load calibrates and compresses after the weights are there; a reload puts empty compressed modules in place
while the model is still on meta, so that the saved tensors load into them and a full-precision model never exists.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer

from hf_lossless.apply import apply_plan
from hf_lossless.calibration.data import load_rows, make_batches, ready_batches, sample_rows, with_own_targets
from hf_lossless.calibration.loss import Batch
from hf_lossless.checkpoint import check_files, guard_names, state_dict_with_guards
from hf_lossless.config import QUANT_METHOD, LosslessCheckpointConfig, LosslessCompressionConfig
from hf_lossless.errors import CheckpointError, ConfigurationError, PlanError
from hf_lossless.modules import CompressedModule, Tied
from hf_lossless.pipeline import CompressionResult, compress, tensor_bytes
from hf_lossless.plan import CompressionPlan, LayerPlan
from hf_lossless.tasks.registry import task_of


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
        if not self.pre_quantized and not isinstance(quantization_config, LosslessCompressionConfig):
            raise ConfigurationError(
                f"quantization_config is a {type(quantization_config).__name__}. "
                "Pass a LosslessCompressionConfig with a dataset and a target."
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
            return model
        saved_layers = self.quantization_config.plan.layers
        apply_plan(model, plans_for(model, saved_layers))
        forget_compressed_ties(model)
        _compute_in_float32(model)
        # Transformers knows a guard by the name it had when saved, which may have a prefix that this model has not.
        saved_guards = {f"{name}.weight" for name, layer_plan in saved_layers.items() if layer_plan.grid is not None}
        guards = {f"^{re.escape(name)}$" for name in guard_names(model) | saved_guards}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | guards
        if checkpoint_files:
            check_files(
                checkpoint_files,
                model,
                _renamer(model),
                complete=_is_saved_class(model),
                ties=model.all_tied_weights_keys,
                unsaved=model._keys_to_ignore_on_save or (),
            )
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Saved under the model's own names. The older names that some architectures keep on disk may join weights that
        # are modules here (Nomic BERT's q, k and v), and codes of different widths cannot be joined.
        model._weight_conversions = []  # type: ignore[assignment]  # a plain attribute
        if self.pre_quantized:
            _refuse_unloaded(model)
            _restore_scales(model)
            self._describe(model, plan_of(model, self.quantization_config.plan))
            return model
        _refuse_meta(model)
        config = self.quantization_config
        with torch.enable_grad():  # the caller may be under no_grad
            self.result = compress(model, calibration_batches(model, config), config)
        forget_compressed_ties(model)
        self._describe(model, self.result.plan)
        return model

    def _describe(self, model: PreTrainedModel, plan: CompressionPlan) -> None:
        self.quantization_config = model.config.quantization_config = LosslessCheckpointConfig.of(plan)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the model's tensors and the guards; the plan counts their bytes."""
        self._describe(model, with_present_bytes(model, self.quantization_config.plan))
        return state_dict_with_guards(model), {}

    def is_serializable(self) -> bool:
        """Yes: codes, scales and zeros are plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: gradients flow through the unpacked weights to what is left in floating point, and to adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Yes, or else transformers' Trainer would refuse the model even for `evaluate()`. Codes are never trained."""
        return True


def calibration_batches(model: PreTrainedModel, config: LosslessCompressionConfig) -> list[Batch]:
    """The batches that a configuration means: its own, or made of its rows by the model's task.

    Raises:
        DataError: The rows cannot be used.
        ConfigurationError: The task is not known.
    """
    batches = ready_batches(config.dataset)
    if batches is None:
        task = task_of(model, config.task)
        rows = sample_rows(load_rows(config.dataset, config.split), config.num_samples, config.seed)
        processor = config.processor if config.processor is not None else task.load_processor(str(model.name_or_path))
        batches = list(make_batches(rows, task, processor, model, config.batch_size))
    return with_own_targets(model, batches, config.task)


def plans_for(model: PreTrainedModel, layer_plans: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
    """A saved plan under this model's names, which lack or have the base model's prefix where the saved ones do not.

    A head that the plan names and this model does not have (AutoModel of a classifier's checkpoint), or a pooler, is
    passed over, but not where the model is of the very class that was saved.

    Raises:
        PlanError: A layer of a model of the saved class is not there, or none of another class.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."

    def local(name: str) -> str | None:
        return next((form for form in (name, prefix + name, name.removeprefix(prefix)) if form in names), None)

    found, missing = {}, []
    for name, layer_plan in layer_plans.items():
        own_name = local(name)
        if own_name is None:
            missing.append(name)
            continue
        tied = tuple(form for form in map(local, layer_plan.tied) if form is not None)
        found[own_name] = layer_plan.model_copy(update={"tied": tied})
    if missing and (_is_saved_class(model) or not found):
        raise PlanError(
            f"the plan names the layer {missing[0]!r}, which {type(model).__name__} does not have. "
            f"Load the checkpoint with the class that saved it: {model.config.architectures}."
        )
    return found


def plan_of(model: PreTrainedModel, saved: CompressionPlan) -> CompressionPlan:
    """A saved plan as it stands in a loaded model: under the model's names, with its bytes.

    A model that took only a part of what was saved (AutoModel of a classifier's checkpoint) can so be saved in turn.
    Its `original_bytes` are those of that part, in the dtype it was loaded in.
    """
    plan = with_present_bytes(model, saved.model_copy(update={"layers": plans_for(model, saved.layers)}))
    if _is_saved_class(model):
        return plan
    original_bytes = plan.tensor_bytes
    for name, layer_plan in plan.layers.items():
        module = model.get_submodule(name)
        if isinstance(module, CompressedModule):
            original_bytes += module.weight_shape.numel() * module.dtype.itemsize - layer_plan.cost_bytes
    return plan.model_copy(update={"original_bytes": original_bytes})


def with_present_bytes(model: PreTrainedModel, plan: CompressionPlan) -> CompressionPlan:
    """A plan of this model with the bytes of its tensors as they are now; a cast changes what is not compressed."""
    layers = {
        name: layer_plan
        if layer_plan.grid is not None
        else layer_plan.model_copy(update={"cost_bytes": model.get_submodule(name).weight.nbytes})
        for name, layer_plan in plan.layers.items()
    }
    other_bytes = tensor_bytes(model) - sum(layer_plan.cost_bytes for layer_plan in layers.values())
    return plan.model_copy(update={"layers": layers, "other_bytes": other_bytes})


def forget_compressed_ties(model: PreTrainedModel) -> None:
    """Takes what is compressed out of the model's lists of tied weights.

    Transformers ties by parameter name, and a compressed module has no parameter of that name; the sharing is done by
    `modules.Tied` now. The class attribute is shadowed on the instance, so that a later `tie_weights()` keeps to it.
    """
    gone = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, CompressedModule | Tied)}
    for prefix, submodel in model.named_modules():
        if not isinstance(submodel, PreTrainedModel):
            continue
        dotted = f"{prefix}." if prefix else ""
        ties = submodel.all_tied_weights_keys
        kept = {target: source for target, source in ties.items() if not {dotted + target, dotted + source} & gone}
        if kept != ties:
            submodel._tied_weights_keys = dict(kept)
            submodel.all_tied_weights_keys = kept


def _compute_in_float32(model: PreTrainedModel) -> None:
    """Where transformers loads a weight in float32 whatever dtype is asked (T5's `wo` in float16), so does its layer.

    On meta the weight still has the dtype that was asked.
    """
    asked = model.config.dtype
    assert isinstance(asked, torch.dtype)
    in_float32 = list(model._get_dtype_plan(asked))
    if not in_float32:
        return
    patterns, _, _ = build_glob_alternation(in_float32)
    for name, module in model.named_modules():
        if isinstance(module, CompressedModule) and patterns.search(f"{name}.weight"):
            module.dtype = torch.float32


def _restore_scales(model: PreTrainedModel) -> None:
    """The scales of such layers were loaded in float32 as well; they go back to the dtype they are stored in."""
    for module in model.modules():
        if isinstance(module, CompressedModule):
            scale_dtype = getattr(torch, module.grid.scale_dtype)
            module.scales = module.scales.to(scale_dtype)
            module.zeros = None if module.zeros is None else module.zeros.to(scale_dtype)


def _is_saved_class(model: PreTrainedModel) -> bool:
    return type(model).__name__ in (model.config.architectures or ())


def _renamer(model: PreTrainedModel) -> Any:
    """From names on disk, which for some architectures are those of older releases, to module names."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = model.state_dict()

    def rename(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        return renamed if renamed in expected or name not in expected else name

    return rename


def _refuse_unloaded(model: PreTrainedModel) -> None:
    """A tensor that no file held is there, with garbage in it: transformers only warns."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedModule):
            for part, tensor in module.named_buffers():
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
