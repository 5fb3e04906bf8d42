"""`WAYS`: which form a layer is computed in, by its storage and kind and by the run time that is asked for.

A way is a function of the layer; None in its place, or from it, is the layer's own floating-point path, which unpacks
the weight at each call ("small", "exact").
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from hf_lossless.storage.layers import LayerKind
from hf_lossless.storage.modules.base import CompressedModule, WholeConv2d
from hf_lossless.storage.modules.coded import CodedModule
from hf_lossless.storage.modules.packed import PackedModule
from hf_lossless.storage.runtime.convolution import DenseConv2d, Int8Conv2d, Window
from hf_lossless.storage.runtime.dense import DenseLinear
from hf_lossless.storage.runtime.form import Form
from hf_lossless.storage.runtime.int8_linear import Int8Linear, int8_available
from hf_lossless.storage.runtime.runtimes import Runtime

SMALL = 2**15
"""Weights of a layer below which the calls around a product in whole numbers take longer than they save."""

Layer = TypeVar("Layer", bound=CompressedModule)
Way = Callable[[Layer], Form | None]


def _coded_linear(layer: CodedModule) -> Form | None:
    """Own codes in 8 bits; a small layer stays in floating point, where it has no weight to unpack."""
    if layer.matrix_shape[0] * layer.matrix_shape[1] < SMALL or not int8_available():
        return None
    assert layer.codes is not None
    return Int8Linear.of_codes(layer.codes, layer.levels(torch.float32), *layer.steps())


def _small_packed_linear(layer: PackedModule) -> Form | None:
    """A small layer has its weight made once.

    Others stay in floating point where outputs have to stay: in whole numbers they moved minilm-sst2 at ratio 6 by a
    divergence of 2.4e-4, beyond the 2e-4 that "auto" may add.
    """
    return DenseLinear(layer.matrix()) if layer.matrix_shape[0] * layer.matrix_shape[1] < SMALL else None


def _packed_linear(layer: PackedModule) -> Form | None:
    """Two rows of 8-bit codes; a small layer has its weight made once."""
    if layer.matrix_shape[0] * layer.matrix_shape[1] < SMALL:
        return DenseLinear(layer.matrix())
    return Int8Linear.of_weight(layer.matrix()) if int8_available() else None


def _dense_convolution(layer: CompressedModule) -> Form | None:
    """The kernel made once: exact, and as quick as the original."""
    assert isinstance(layer, WholeConv2d)
    return DenseConv2d(layer.matrix().view(layer.weight_shape), _window(layer))


def _int8_convolution(layer: CompressedModule) -> Form | None:
    """Whole numbers where a kernel is large enough and in one group."""
    assert isinstance(layer, WholeConv2d)
    window = _window(layer)
    numbers = not isinstance(window.padding, str) and window.groups == 1
    if not numbers or layer.weight_shape.numel() < SMALL or not int8_available():
        return _dense_convolution(layer)
    return Int8Conv2d(layer.matrix().view(layer.weight_shape), window)


def _window(layer: WholeConv2d) -> Window:
    return Window(layer.stride, layer.padding, layer.dilation, layer.groups)


_CODED: dict[LayerKind, Way[CodedModule]] = {
    "linear": _coded_linear,
    "conv1d": _coded_linear,
    "conv2d": _dense_convolution,
}
_PACKED: dict[LayerKind, Way[PackedModule]] = {
    "linear": _small_packed_linear,
    "conv1d": _small_packed_linear,
    "conv2d": _dense_convolution,
}

WAYS: dict[Runtime, tuple[dict[LayerKind, Way[CodedModule]], dict[LayerKind, Way[PackedModule]]]] = {
    "auto": (_CODED, _PACKED),
    "fast": (
        {**_CODED, "conv2d": _int8_convolution},
        {"linear": _packed_linear, "conv1d": _packed_linear, "conv2d": _int8_convolution},
    ),
    "small": ({}, {}),
    "exact": ({}, {}),
}


def make_form(runtime: Runtime, kind: LayerKind, layer: CompressedModule) -> Form | None:
    """Makes the run-time form of a layer.

    Args:
        runtime: What is asked for.
        kind: What the layer computes: its own kind, but "linear" for an embedding that is also a model's head.
        layer: Filled and decoded, or on meta.

    Returns:
        None where the layer goes its own way: on a GPU or on meta, in another dtype than float32, or where none pays.
    """
    device = next(layer.buffers(), torch.empty(0, device="meta")).device
    if device.type != "cpu" or layer.dtype is not torch.float32:
        return None
    coded, packed = WAYS[runtime]
    if isinstance(layer, CodedModule):
        way = coded.get(kind)
        return way(layer) if way is not None and layer.row_steps is not None else None
    if isinstance(layer, PackedModule):
        packed_way = packed.get(kind)
        return packed_way(layer) if packed_way is not None else None
    return None  # two factors are layers of their own
