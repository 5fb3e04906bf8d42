"""The format "compressed-tensors" (pack-quantized), of the package of that name, which vLLM reads too.

    weight_packed    int32 [out, ceil(in * bits / 32)]    codes, the first in the lowest bits of a word
    weight_scale     [out, groups]                        in the model's dtype
    weight_shape     int64 [2]                            out, in

It holds linear layers only: transformers cannot make an embedding of this format, skips convolutions, and fills its
Conv1D with random weights. Groups must divide a row. In transformers a model of this format is small on disk only: its
first forward pass unpacks all weights.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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

_OTHER_KINDS = {"embedding": "it is an embedding", "conv2d": "it is a convolution", "conv1d": "it is a Conv1D"}


def store(model: PreTrainedModel, name: str, layer_plan: LayerPlan) -> Stored:
    """Stores a linear layer's codes and scales.

    Raises:
        NotConvertible: It is no linear layer, or the format has no such grid.
    """
    module = compressed_module(model, name)
    if module.kind != "linear":
        raise NotConvertible(_OTHER_KINDS[module.kind])
    numbers = whole_numbers(module, layer_plan, model_dtype(model))
    out_features, in_features = module.matrix_shape
    if numbers.group_size is not None and in_features % numbers.group_size:
        raise NotConvertible(f"its {in_features} inputs are no whole number of groups of {numbers.group_size}")
    return Stored(
        {
            "weight_packed": pack_words(numbers.codes, numbers.bits),
            "weight_scale": numbers.scales,
            "weight_shape": torch.tensor([out_features, in_features]),
        },
        numbers.bits,
        numbers.group_size,
        numbers.rounded,
    )


def quantization_config(model: PreTrainedModel, stored: dict[str, Stored]) -> dict[str, Any]:
    """Makes the entry of config.json: a group of settings for each width and group size, with its layers' names."""
    names = defaultdict(list)
    for name, layer in stored.items():
        names[layer.bits, layer.group_size].append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": [f"re:{name_pattern([name], model.base_model_prefix)}" for name in group],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    **({"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}),
                },
            }
            for index, ((bits, size), group) in enumerate(names.items())
        },
    }


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Packs codes of 2, 4 or 8 bits in 32-bit words, row by row: the first in the lowest bits, zeros as padding.

    Args:
        codes: uint8 [out, in], each below 2^bits.
        bits: 2, 4 or 8.

    Returns:
        int32 [out, ceil(in * bits / 32)].

    Example:
        >>> pack_words(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=8).tolist()  # 0x030201
        [[197121]]
    """
    packed = pack_bytes(codes, bits)
    places = torch.arange(0, 32, 8, dtype=torch.int32, device=codes.device)
    of_words = nn.functional.pad(packed, (0, -packed.shape[1] % 4)).view(len(codes), -1, 4).to(torch.int32)
    return torch.bitwise_left_shift(of_words, places).sum(-1, dtype=torch.int32)
