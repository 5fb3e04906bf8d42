"""Layers that hold packed codes instead of a weight.

    codes    uint8   [rows, packed bytes]   rows = vocabulary for an embedding, 1 for all else (see `packing`)
    scales   float16 or float32 [out, groups]
    zeros    like scales; only for an asymmetric grid
    bias     of the original, where it had one

A module unpacks its weight at each call and does not keep it, so that memory stays small; an embedding unpacks only the
rows it looks up.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lossless.storage.grid import QuantisedMatrix, dequantise
from hf_lossless.storage.layers import Layer, LayerKind
from hf_lossless.storage.modules.activations import keeping_dtype
from hf_lossless.storage.modules.base import CompressedModule, WholeConv2d, WholeEmbedding, WholeLinear
from hf_lossless.storage.packing import pack, packed_width, unpack
from hf_lossless.storage.plan import Grid


class PackedModule(CompressedModule):
    """Base of the packed layers: the codes and the grid to unpack them.

    Attributes:
        grid: The grid of the codes.
        dtype: Dtype in which the module computes; follows `.to(dtype)` as a weight would, while scales keep theirs.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, layer: Layer, grid: Grid) -> None:
        """Makes an empty module for `layer`, on its device; `store` fills it."""
        super().__init__(layer)
        self.grid = grid
        out_features, in_features = self.matrix_shape
        device = layer.weight.device
        rows = layer.packed_rows
        width = packed_width(out_features * in_features // rows, grid.bits)
        per_group = (out_features, grid.num_groups(in_features))
        scale_dtype = getattr(torch, grid.scale_dtype)
        self.register_buffer("codes", torch.empty(rows, width, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(per_group, dtype=scale_dtype, device=device))
        zeros = None if grid.symmetric else torch.empty(per_group, dtype=scale_dtype, device=device)
        self.register_buffer("zeros", zeros)

    def store(self, quantised: QuantisedMatrix) -> None:
        """Stores the codes, scales and zeros of a matrix."""
        self.codes.copy_(pack(quantised.codes.reshape(len(self.codes), -1), self.grid.bits))
        self.scales.copy_(quantised.scales)
        if self.zeros is not None and quantised.zeros is not None:
            self.zeros.copy_(quantised.zeros)

    def matrix(self) -> Tensor:
        """Unpacks the weight `W [out, in]` in the module's dtype."""
        out_features, in_features = self.matrix_shape
        per_row = out_features * in_features // len(self.codes)
        codes = unpack(self.codes, self.grid.bits, per_row).view(out_features, in_features)
        return dequantise(codes, self.scales, self.zeros, self.grid).to(self.dtype)

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Computes y = x W' + b with the unpacked weight."""
        return F.linear(input, self.matrix(), bias)

    def embedding(self, indices: Tensor) -> Tensor:
        """Looks up rows of the unpacked weight."""
        return F.embedding(indices, self.matrix())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves as any module does, but a cast keeps the scales' dtype and only sets `self.dtype`."""
        return super()._apply(keeping_dtype(fn, (self.scales, self.zeros)), recurse)

    def extra_repr(self) -> str:
        """Returns shape and grid, for `print(model)`."""
        out_features, in_features = self.matrix_shape
        group = self.grid.group_size or "row"
        return f"{out_features}x{in_features}, bits={self.grid.bits}, group_size={group}, bias={self.bias is not None}"


class PackedLinear(WholeLinear, PackedModule):
    """nn.Linear, or transformers' Conv1D, whose weight is [in, out]."""


class PackedConv2d(WholeConv2d, PackedModule):
    """nn.Conv2d, grouped and depthwise too."""


class PackedEmbedding(WholeEmbedding, PackedModule):
    """nn.Embedding; looks up packed rows and unpacks only those."""

    def embedding(self, indices: Tensor) -> Tensor:
        """Looks up rows of the weight, and unpacks only these."""
        flat, dim = indices.reshape(-1), self.matrix_shape[1]
        codes = unpack(self.codes.index_select(0, flat), self.grid.bits, dim)  # refuses index -1
        zeros = None if self.zeros is None else self.zeros.index_select(0, flat)
        rows = dequantise(codes, self.scales.index_select(0, flat), zeros, self.grid).to(self.dtype)
        return rows.view(*indices.shape, dim)


PACKED: dict[LayerKind, type[PackedModule]] = {
    "linear": PackedLinear,
    "conv1d": PackedLinear,
    "conv2d": PackedConv2d,
    "embedding": PackedEmbedding,
}
