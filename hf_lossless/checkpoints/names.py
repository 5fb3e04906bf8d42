"""Maps a saved plan to a transformers model: names of layers and of tensors on disk, ties, dtypes and bytes."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, rename_source_key

from hf_lossless.errors import CheckpointError, PlanError
from hf_lossless.storage.apply import resolve
from hf_lossless.storage.entropy.coder import choose_kernel
from hf_lossless.storage.entropy.kernels import decode_lanes
from hf_lossless.storage.kinds import KINDS
from hf_lossless.storage.layers import tensor_bytes
from hf_lossless.storage.modules.base import CompressedModule, compressed_layers
from hf_lossless.storage.modules.coded import CodedModule
from hf_lossless.storage.modules.packed import PackedModule
from hf_lossless.storage.modules.tied import Tied
from hf_lossless.storage.plan import CompressionPlan, LayerPlan, activations_of


def plans_for(model: PreTrainedModel, layer_plans: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
    """Maps a saved plan to this model's names, which may differ by the base model's prefix.

    A head or a pooler that the plan names and this model does not have (AutoModel of a classifier's checkpoint) is
    skipped, unless the model is of the saved class.

    Raises:
        PlanError: The model is of the saved class and lacks a layer, or none of the layers is in the model.
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
    if missing and (is_saved_class(model) or not found):
        raise PlanError(
            f"the plan names the layer {missing[0]!r}, which {type(model).__name__} does not have. "
            f"Load the checkpoint with the class that saved it: {model.config.architectures}."
        )
    return found


def resized_layers(
    model: PreTrainedModel, layer_plans: Mapping[str, LayerPlan], saved: Mapping[str, tuple[int, ...]]
) -> set[str]:
    """Finds the layers whose shape in a model differs from the saved one, as in a head for other labels.

    Args:
        model: The model on meta, with its original layers.
        layer_plans: The plan under this model's names.
        saved: Shapes of the saved tensors, by their names on disk.
    """
    prefix = f"{model.base_model_prefix}."
    found = set()
    for name, layer_plan in layer_plans.items():
        if layer_plan.kind == "kept":
            continue
        layer = resolve(model, name, layer_plan)
        forms = (name, prefix + name, name.removeprefix(prefix))
        own_shape = tuple(layer.matrix.shape)
        bias = getattr(layer.module, "bias", None)
        if bias is not None and any(saved.get(f"{form}.bias") == bias.shape for form in forms):
            fits = True  # the number of outputs is the same: if its plan does not fit anyway, `apply_plan` raises
        elif (stated := layer_plan.coded or layer_plan.low_rank) is not None and stated.shape == own_shape:
            fits = True
        elif layer_plan.coded is not None:
            fits = False
        else:
            if layer_plan.low_rank is not None:
                low_rank = layer_plan.low_rank.model_copy(update={"shape": own_shape})
                layer_plan = layer_plan.model_copy(update={"low_rank": low_rank})
            make = KINDS[layer_plan.kind].module
            assert make is not None
            fits = all(
                saved.get(f"{form}.{part}", tensor.shape) == tensor.shape
                for part, tensor in make(layer, layer_plan).weight_tensors.items()
                for form in forms
            )
        if not fits:
            found.add(name)
    return found


def plan_of(
    model: PreTrainedModel, saved: CompressionPlan, layers: dict[str, LayerPlan], *, complete: bool
) -> CompressionPlan:
    """Makes the plan of a loaded model from the saved one: under the model's names, with its bytes.

    A model that loaded only a part of what was saved (AutoModel of a classifier's checkpoint) can thus be saved in
    turn. Its `original_bytes` are those of that part, in the dtype it was loaded in.

    Args:
        model: The model.
        saved: The saved plan.
        layers: The layers that the model loaded, under its own names.
        complete: Whether it loaded all layers.
    """
    plan = _with_layers(model, saved, layers)
    return plan if complete else _with_own_original_bytes(model, plan)


def plan_of_part(part: PreTrainedModel, name: str, whole: CompressionPlan) -> CompressionPlan:
    """Makes the plan of a part of a compressed model from the whole model's plan.

    Args:
        part: The part, itself a model of transformers.
        name: Its name in the whole.
        whole: The whole model's plan.
    """
    prefix = f"{name}."
    layers = {
        layer.removeprefix(prefix): layer_plan.model_copy(
            update={"tied": tuple(one.removeprefix(prefix) for one in layer_plan.tied if one.startswith(prefix))}
        )
        for layer, layer_plan in whole.layers.items()
        if layer.startswith(prefix)
    }
    return _with_own_original_bytes(part, _with_layers(part, whole, layers))


def _with_layers(model: PreTrainedModel, plan: CompressionPlan, layers: dict[str, LayerPlan]) -> CompressionPlan:
    return with_present_bytes(model, plan.model_copy(update={"layers": layers, "activations": activations_of(layers)}))


def _with_own_original_bytes(model: PreTrainedModel, plan: CompressionPlan) -> CompressionPlan:
    """Sets `original_bytes` to those of this model, a part of the original, in the dtypes it computes in."""
    original_bytes = plan.tensor_bytes
    for name, layer_plan in plan.layers.items():
        module = model.get_submodule(name)
        if isinstance(module, CompressedModule):
            original_bytes += module.weight_shape.numel() * module.dtype.itemsize - layer_plan.cost_bytes
    return plan.model_copy(update={"original_bytes": original_bytes})


def refuse_other_layers(model: PreTrainedModel, plan: CompressionPlan) -> None:
    """Raises an error where a model differs from its plan, so that it could be saved but not loaded.

    Raises:
        CheckpointError: A layer of the plan was replaced (by an adapter, a merge, a resize), a compressed layer is not
            in the plan, or a layer computes with the weight of a layer outside of this model.
    """
    remedy = "Put the model back as it was (an adapter: unload() it) and save it then; an adapter is saved by itself."
    compressed = compressed_layers(model)
    for name, layer_plan in plan.layers.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if module is None or (layer_plan.kind != "kept" and name not in compressed):
            raise CheckpointError(
                f"this {type(model).__name__} cannot be saved: its plan compresses the layer {name!r}, which "
                f"{'is not there any more' if module is None else f'is a {type(module).__name__} now'}. {remedy}"
            )
    unknown = [name for name in compressed if name not in plan.layers]
    if unknown:
        raise CheckpointError(
            f"this {type(model).__name__} cannot be saved: the layer {unknown[0]!r} is compressed, but its plan does "
            f"not name it. {remedy}"
        )
    homes = set(compressed.values())
    for name, module in model.named_modules():
        if isinstance(module, Tied) and module.home not in homes:
            raise CheckpointError(
                f"this {type(model).__name__} cannot be saved by itself: its layer {name!r} computes with a weight "
                "that lies outside of it. Save the whole model, and load this part from that."
            )


def with_present_bytes(model: PreTrainedModel, plan: CompressionPlan) -> CompressionPlan:
    """Updates the bytes of a plan's tensors to their present dtypes; a cast changes those in floating point."""
    layers = {}
    for name, layer_plan in plan.layers.items():
        module = model.get_submodule(name)
        cost_bytes = module.weight_bytes if isinstance(module, CompressedModule) else module.weight.nbytes
        layers[name] = layer_plan.model_copy(update={"cost_bytes": cost_bytes})
    other_bytes = tensor_bytes(model) - sum(layer_plan.cost_bytes for layer_plan in layers.values())
    return plan.model_copy(update={"layers": layers, "other_bytes": other_bytes})


def is_saved_class(model: PreTrainedModel) -> bool:
    """Returns whether a model is of the class that was saved, so that every saved layer must be found in it."""
    return type(model).__name__ in (model.config.architectures or ())


def forget_compressed_ties(model: PreTrainedModel) -> None:
    """Removes compressed layers from the model's lists of tied weights.

    Transformers ties by parameter name, and a compressed module has no parameter of that name; `storage.modules.tied`
    shares the weight instead. The class attribute is shadowed on the instance, so that a later `tie_weights()` uses the
    shortened list.
    """
    tied = (name for name, module in model.named_modules() if isinstance(module, Tied))
    compressed = {f"{name}.weight" for name in (*compressed_layers(model), *tied)}
    for prefix, submodel in model.named_modules():
        if not isinstance(submodel, PreTrainedModel):
            continue
        dotted = f"{prefix}." if prefix else ""
        ties = submodel.all_tied_weights_keys
        kept = {
            target: source for target, source in ties.items() if not {dotted + target, dotted + source} & compressed
        }
        if kept != ties:
            submodel._tied_weights_keys = dict(kept)
            submodel.all_tied_weights_keys = kept


def compute_in_float32(model: PreTrainedModel) -> None:
    """Sets layers to compute in float32 where transformers always loads their weights so (T5's `wo` in float16).

    On meta the weight still has the requested dtype.
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


def restore_scales(model: PreTrainedModel) -> None:
    """Casts the scales of layers that were loaded in float32 back to the dtype they are stored in."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            scale_dtype = getattr(torch, module.grid.scale_dtype)
            module.scales = module.scales.to(scale_dtype)
            module.zeros = None if module.zeros is None else module.zeros.to(scale_dtype)


def name_in_model(model: PreTrainedModel) -> Callable[[str], str]:
    """Makes the map from names on disk, which for some architectures are those of older releases, to module names."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = model.state_dict()

    def rename(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        return renamed if renamed in expected or name not in expected else name

    return rename


def decode_layers(model: PreTrainedModel) -> None:
    """Decodes the loaded entropy-coded layers, in as many threads as torch uses.

    Without numba there is one thread: numpy holds Python's lock between its calls, which are short here.

    Raises:
        CheckpointError: A tensor was cut or changed; the message names it.
        ConfigurationError: A layer is of version 1 of the coding, and the library that reads it is not installed.
    """
    coded = {name: module for name, module in compressed_layers(model).items() if isinstance(module, CodedModule)}
    kernel = choose_kernel(sum(math.prod(module.matrix_shape) for module in coded.values()))
    num_threads = 1 if kernel is decode_lanes else torch.get_num_threads()
    with ThreadPoolExecutor(num_threads) as threads:
        decoding = [threads.submit(module.decode, name, kernel) for name, module in coded.items()]
        try:
            for one in decoding:
                one.result()
        finally:
            threads.shutdown(cancel_futures=True)
