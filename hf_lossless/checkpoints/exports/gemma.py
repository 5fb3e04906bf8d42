"""The format "gemma", transformers' own for whole numbers: linear layers and embeddings that stay packed at run time.

    linear       weight                 uint8 [out, ceil(in * bits / 8)], or int8 [out, in] at 8 bits
                 weight_scale           float32 [out, 1]
                 input_activation_scale, output_activation_scale      float32 [], 0: activations stay in floating point
    embedding    embedding_quantized    as weight
                 embedding_scale        as weight_scale

Each output has one scale (compress with `--group-size 0`). The format was made for the checkpoints of Gemma, needs no
other package, and may change with transformers; a model loaded from it cannot be saved again.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_lossless.checkpoints.exports.convert import (
    NotConvertible,
    Stored,
    compressed_module,
    model_dtype,
    name_pattern,
    pack_bytes,
    whole_numbers,
)
from hf_lossless.storage.plan import LayerPlan

_OTHER_KINDS = {"conv2d": "it is a convolution", "conv1d": "it is a Conv1D"}


def store(model: PreTrainedModel, name: str, layer_plan: LayerPlan) -> Stored:
    """Stores a layer's codes and scales.

    Raises:
        NotConvertible: It is a convolution or a Conv1D, or the format has no such grid.
    """
    module = compressed_module(model, name)
    if module.kind in _OTHER_KINDS:
        raise NotConvertible(_OTHER_KINDS[module.kind])
    if not should_convert_module(name, list(model._keep_in_fp32_modules or ())):
        raise NotConvertible("transformers keeps it in float32")
    numbers = whole_numbers(module, layer_plan, model_dtype(model))
    if numbers.group_size is not None:
        raise NotConvertible(f"groups of {numbers.group_size} inputs have a scale each, and not all inputs together")
    codes, scales = pack_numbers(numbers.codes, numbers.bits), numbers.scales.float()
    if module.kind == "embedding":
        tensors = {"embedding_quantized": codes, "embedding_scale": scales}
    else:
        unquantised = {f"{side}_activation_scale": torch.tensor(0.0) for side in ("input", "output")}
        tensors = {"weight": codes, "weight_scale": scales, **unquantised}
    return Stored(tensors, numbers.bits, None, numbers.rounded)


def quantization_config(model: PreTrainedModel, stored: dict[str, Stored]) -> dict[str, Any]:
    """Makes the entry of config.json: the width of each stored module, and a pattern that excludes all others."""
    widths = sorted({layer.bits for layer in stored.values() if layer.bits is not None})
    names = {bits: [name for name, layer in stored.items() if layer.bits == bits] for bits in widths}
    return {
        "quant_method": "gemma",
        "quantize_embeddings": True,
        "module_quant_configs": {
            f"^{name_pattern(names[bits], model.base_model_prefix)}": {"num_bits": bits} for bits in widths
        },
        "modules_to_not_convert": [f"(?!{name_pattern(list(stored), model.base_model_prefix)}).*$"],
    }


def pack_numbers(codes: Tensor, bits: int) -> Tensor:
    """Packs codes q + 2^(bits-1), uint8 [out, in], in bytes; at 8 bits, returns q itself as int8."""
    return (codes.to(torch.int16) - 128).to(torch.int8) if bits == 8 else pack_bytes(codes, bits)
