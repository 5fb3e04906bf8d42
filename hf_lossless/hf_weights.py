"""What transformers keeps about weights by their names, put right for compressed layers: ties, dtypes, disk names."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation, rename_source_key

from hf_lossless.storage.modules.base import CompressedModule, compressed_layers
from hf_lossless.storage.modules.coded import CodedModule
from hf_lossless.storage.modules.packed import PackedModule
from hf_lossless.storage.modules.tied import Tied


def forget_compressed_ties(model: PreTrainedModel) -> None:
    """Takes what is compressed out of the model's lists of tied weights.

    Transformers ties by parameter name, and a compressed module has no parameter of that name; the sharing is done by
    `storage.modules.tied` now. The class attribute is shadowed on the instance, so that a later `tie_weights()` keeps to it.
    """
    tied = (name for name, module in model.named_modules() if isinstance(module, Tied))
    gone = {f"{name}.weight" for name in (*compressed_layers(model), *tied)}
    for prefix, submodel in model.named_modules():
        if not isinstance(submodel, PreTrainedModel):
            continue
        dotted = f"{prefix}." if prefix else ""
        ties = submodel.all_tied_weights_keys
        kept = {target: source for target, source in ties.items() if not {dotted + target, dotted + source} & gone}
        if kept != ties:
            submodel._tied_weights_keys = dict(kept)
            submodel.all_tied_weights_keys = kept


def compute_in_float32(model: PreTrainedModel) -> None:
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


def restore_scales(model: PreTrainedModel) -> None:
    """The scales of such layers were loaded in float32 as well; they go back to the dtype they are stored in."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            scale_dtype = getattr(torch, module.grid.scale_dtype)
            module.scales = module.scales.to(scale_dtype)
            module.zeros = None if module.zeros is None else module.zeros.to(scale_dtype)


def name_in_model(model: PreTrainedModel) -> Callable[[str], str]:
    """From names on disk, which for some architectures are those of older releases, to module names."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = model.state_dict()

    def rename(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        return renamed if renamed in expected or name not in expected else name

    return rename


def decode_layers(model: PreTrainedModel) -> None:
    """Decodes the entropy-coded layers that have been loaded.

    One after the other: the coder holds Python's lock, so that threads were no faster.

    Raises:
        CheckpointError: A tensor was cut or changed; the message names it.
        ConfigurationError: The coder is not installed.
    """
    for name, module in compressed_layers(model).items():
        if isinstance(module, CodedModule):
            module.decode(name)
