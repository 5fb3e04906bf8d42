"""Replaces compressed layers by plain ones that have the compressed values as their weights."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lossless.storage.layers import LayerKind
from hf_lossless.storage.modules.base import CompressedModule, compressed_layers
from hf_lossless.storage.modules.tied import Tied, TiedEmbedding


def make_dense(model: nn.Module) -> nn.Module:
    """Replaces every compressed layer of a model by a plain one, in place; tied weights are tied again.

    The weights are those that the model computes with. Inputs that were quantised are not quantised any more.

    Returns:
        The model.
    """
    for name, module in compressed_layers(model).items():
        plain = dense_layer(module)
        for tied_name, tied in list(model.named_modules()):
            if isinstance(tied, Tied) and tied.home is module:
                model.set_submodule(tied_name, _tied_again(tied, plain))
        model.set_submodule(name, plain)
    return model


def dense_layer(module: CompressedModule) -> nn.Module:
    """Makes a plain layer with a compressed layer's values, bias and mode."""
    with torch.no_grad():
        weight = nn.Parameter(module.weight.detach().clone(memory_format=torch.contiguous_format))
    return _layer(module, module.kind, weight)


def _layer(module: CompressedModule, kind: LayerKind, weight: nn.Parameter) -> nn.Module:
    """Makes a plain layer of a kind with this weight; it is built on meta, so that no random weight is drawn."""
    out_features, in_features = module.matrix_shape
    has_bias = module.bias is not None
    original: Any = module  # it has the original's attributes
    plain: nn.Module
    with torch.device("meta"):
        if kind == "linear":
            plain = nn.Linear(in_features, out_features, bias=has_bias)
        elif kind == "conv1d":
            plain = Conv1D(out_features, in_features)  # type: ignore[no-untyped-call]
        elif kind == "embedding":
            plain = nn.Embedding(out_features, in_features, padding_idx=original.padding_idx)
        else:
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            plain = nn.Conv2d(**{name: getattr(original, name) for name in names}, bias=has_bias)
    plain.weight = weight
    if kind != "embedding":
        plain.register_parameter("bias", module.bias)
    return plain.train(module.training)


def _tied_again(tied: Tied, home: nn.Module) -> nn.Module:
    weight = home.weight
    assert isinstance(weight, nn.Parameter)
    out_features, in_features = weight.shape
    plain: nn.Module
    with torch.device("meta"):
        if isinstance(tied, TiedEmbedding):
            plain = nn.Embedding(out_features, in_features, padding_idx=tied.padding_idx)
        else:
            plain = nn.Linear(in_features, out_features, bias=tied.bias is not None)
            plain.register_parameter("bias", tied.bias)
    plain.weight = weight
    return plain.train(tied.training)
