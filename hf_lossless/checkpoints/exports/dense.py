"""The format "dense": the compressed values as plain weights, which every architecture and every tool can load.

A layer is saved as its weight `W`, rebuilt from codes or factors, in the dtype that it computes in. Where factors were
multiplied one after the other, their product is rounded once more.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lossless.checkpoints.exports.convert import Stored, compressed_module
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.plan import LayerPlan


def store(model: PreTrainedModel, name: str, layer_plan: LayerPlan) -> Stored:
    """Stores the weight of a layer; raises NotConvertible where its input is quantised."""
    return store_weight(compressed_module(model, name))


def store_weight(module: CompressedModule) -> Stored:
    """Stores the weight in its original shape; a quantised input becomes floating point."""
    return Stored({"weight": module.weight.detach().clone(memory_format=torch.contiguous_format)})


def quantization_config(model: PreTrainedModel, stored: dict[str, Stored]) -> dict[str, Any] | None:
    """Returns None, because dense weights need no entry in config.json."""
    return None
