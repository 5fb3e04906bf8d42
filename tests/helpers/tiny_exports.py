"""Compressed checkpoints of tiny models with plans written by hand, and what stock transformers should make of them."""

import copy
from collections.abc import Callable
from pathlib import Path

import transformers as hf
from rounded_plans import apply_rounded
from tiny_models import TinyModel
from tiny_plans import by_hand, fitting_grid
from torch import nn

from hf_lossless import CompressionPlan, LayerPlan, LosslessCheckpointConfig, LosslessHfQuantizer
from hf_lossless.candidates.low_rank import Factors
from hf_lossless.checkpoints.names import forget_compressed_ties, with_present_bytes
from hf_lossless.storage.layers import Layer, find_layers, tensor_bytes
from hf_lossless.storage.modules.base import compressed_layers
from hf_lossless.storage.modules.tied import Tied
from hf_lossless.storage.values import EncodedMatrix

Planned = tuple[LayerPlan, Factors | EncodedMatrix | None]


def all_widths(group_size: int | None = None, **settings) -> Callable[[int, Layer], Planned]:
    """1 to 8 bits, one layer after the other, on grids like this."""

    def plan(index: int, layer: Layer) -> Planned:
        grid = fitting_grid(layer.matrix, 1 + index % 8, group_size=group_size, **settings)
        return LayerPlan(kind="grid", grid=grid, cost_bytes=0, predicted_loss_change=0.0, tied=layer.tied), None

    return plan


def all_kinds(index: int, layer: Layer) -> Planned:
    """Kept, a grid, factors, packed factors, a grid and factors, a grid with zero points."""
    shape = layer.matrix.shape
    if getattr(layer.module, "groups", 1) > 1 or 2 * sum(shape) >= shape.numel():  # rank 2 would save nothing
        return by_hand(layer, "grid")
    match index % 6:
        case 0:
            return by_hand(layer, "grid")
        case 1:
            return by_hand(layer, "kept")
        case 2:
            return by_hand(layer, "low_rank")
        case 3:
            return by_hand(layer, "low_rank", left=4, right=5)
        case 4:
            return by_hand(layer, "sum", left=4)
        case _:
            return all_widths(8, symmetric=False)(2, layer)


def save_compressed(
    tiny: TinyModel, folder: Path, plan: Callable[[int, Layer], Planned], dtype=None, max_shard_size: str = "1GB"
) -> hf.PreTrainedModel:
    """Compresses a tiny model as `plan(index, layer)` says of each layer, saves it, and gives it back as it loads."""
    model = tiny.build()
    model = model if dtype is None else model.to(dtype)
    before = tensor_bytes(model)
    planned = {layer.name: plan(index, layer) for index, layer in enumerate(find_layers(model))}
    plans = {name: layer_plan for name, (layer_plan, _) in planned.items()}
    factors = {name: values for name, (_, values) in planned.items() if isinstance(values, Factors)}
    coded = {name: values for name, (_, values) in planned.items() if isinstance(values, EncodedMatrix)}
    apply_rounded(model, plans, factors, coded)
    forget_compressed_ties(model)
    activations = "quantised" if any(one.activation for one in plans.values()) else "float"
    whole = CompressionPlan(theory="llc", layers=plans, other_bytes=0, original_bytes=before, activations=activations)
    entry = LosslessCheckpointConfig.of(with_present_bytes(model, whole))
    model.hf_quantizer = LosslessHfQuantizer(entry, pre_quantized=True)
    model.config = copy.deepcopy(model.config)  # the tiny model's own stays as it is
    model.config.quantization_config = entry
    model._weight_conversions = []
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return tiny.model_class.from_pretrained(folder)


def dense_reference(tiny: TinyModel, compressed: hf.PreTrainedModel, folder: Path) -> hf.PreTrainedModel:
    """The original, saved to a folder and loaded in the same dtype, with the compressed values as its weights."""
    tiny.build().to(compressed.dtype).save_pretrained(folder)
    reference = tiny.model_class.from_pretrained(folder)
    for name, module in compressed_layers(compressed).items():
        shared = nn.Parameter(module.weight.detach().clone().contiguous())
        reference.get_submodule(name).weight = shared
        for tied, user in compressed.named_modules():
            if isinstance(user, Tied) and user.home is module:
                reference.get_submodule(tied).weight = shared
    return reference
