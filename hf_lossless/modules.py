"""Layers that hold packed codes instead of a weight.

A compressed module stands where the original stood, with the same attributes, and keeps

    codes    uint8   [rows, packed bytes]   rows = vocabulary for an embedding, 1 for all else (see `packing`)
    scales   float16 or float32 [out, groups]
    zeros    like scales; only for an asymmetric grid
    bias     as it came, where there was one

It unpacks its weight anew for each call and keeps nothing of it, so that memory stays small; an embedding unpacks only
the rows it looks up. Modules are replaced rather than tensor types: that is easier to read, to debug and to save.

Names matter to transformers: no buffer begins with "weight" (its tying code matches prefixes), and scales are buffers,
for a float parameter would come back trainable and could pass for the model's dtype.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.candidates.uniform import QuantisedMatrix, dequantise
from hf_lossless.layers import Layer, LayerKind
from hf_lossless.packing import pack, packed_width, unpack
from hf_lossless.plan import Grid


class CompressedModule(nn.Module):
    """Base of the compressed layers: the packed weight and how to read it.

    Attributes:
        grid: The grid of the codes.
        matrix_shape: (out, in) of the weight as a matrix.
        dtype: In what dtype the module computes; follows `.to(dtype)` as a weight would, while scales keep theirs.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, layer: Layer, grid: Grid) -> None:
        """Makes an empty module for `layer`, on its device; `store` fills it."""
        super().__init__()
        weight = layer.weight
        self.grid = grid
        self.kind: LayerKind = layer.kind
        self.weight_shape = weight.shape
        out_features, in_features = self.matrix_shape = tuple(layer.matrix.shape)
        self.dtype = weight.dtype
        self.training = layer.module.training
        rows = layer.packed_rows
        width = packed_width(out_features * in_features // rows, grid.bits)
        per_group = (out_features, grid.num_groups(in_features))
        scale_dtype = getattr(torch, grid.scale_dtype)
        self.register_buffer("codes", torch.empty(rows, width, dtype=torch.uint8, device=weight.device))
        self.register_buffer("scales", torch.empty(per_group, dtype=scale_dtype, device=weight.device))
        zeros = None if grid.symmetric else torch.empty(per_group, dtype=scale_dtype, device=weight.device)
        self.register_buffer("zeros", zeros)
        self.register_parameter("bias", getattr(layer.module, "bias", None))

    def store(self, quantised: QuantisedMatrix) -> None:
        """Takes in the codes, scales and zeros of a matrix."""
        self.codes.copy_(pack(quantised.codes.reshape(len(self.codes), -1), self.grid.bits))
        self.scales.copy_(quantised.scales)
        if self.zeros is not None and quantised.zeros is not None:
            self.zeros.copy_(quantised.zeros)

    def matrix(self) -> Tensor:
        """The weight `W [out, in]` in the module's dtype, unpacked now."""
        out_features, in_features = self.matrix_shape
        per_row = out_features * in_features // len(self.codes)
        codes = unpack(self.codes, self.grid.bits, per_row).view(out_features, in_features)
        return dequantise(codes, self.scales, self.zeros, self.grid).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight in its original shape, unpacked now: for code that looks at it, not to be written to."""
        matrix = self.matrix()
        weight = matrix.T if self.kind == "conv1d" else matrix.view(self.weight_shape)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers must not initialise it anew
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompressedModule":
        """Moves as any module does, but a change of dtype leaves the scales alone and only sets `self.dtype`."""
        held = (self.scales, self.zeros)

        def keeping_dtype(tensor: Tensor) -> Tensor:
            if any(tensor is one for one in held):  # a cast leaves whole numbers alone, so they pass as bytes
                return fn(tensor.view(torch.uint8)).view(tensor.dtype)
            return fn(tensor)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        super()._apply(keeping_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Shape and grid, for `print(model)`."""
        out_features, in_features = self.matrix_shape
        group = self.grid.group_size or "row"
        return f"{out_features}x{in_features}, bits={self.grid.bits}, group_size={group}, bias={self.bias is not None}"


class CompressedLinear(CompressedModule):
    """nn.Linear, or transformers' Conv1D, whose weight is [in, out]."""

    def __init__(self, layer: Layer, grid: Grid) -> None:
        super().__init__(layer, grid)
        self.out_features, self.in_features = self.matrix_shape
        if layer.kind == "conv1d":
            self.nx, self.nf = self.in_features, self.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Computes y = x W' + b."""
        return F.linear(input, self.matrix(), self.bias)


class CompressedConv2d(CompressedModule):
    """nn.Conv2d, grouped and depthwise too."""

    def __init__(self, layer: Layer, grid: Grid) -> None:
        super().__init__(layer, grid)
        original = layer.module
        assert isinstance(original, nn.Conv2d)
        self.in_channels, self.out_channels = original.in_channels, original.out_channels
        self.kernel_size, self.stride, self.dilation = original.kernel_size, original.stride, original.dilation
        self.padding, self.padding_mode, self.groups = original.padding, original.padding_mode, original.groups

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the unpacked kernel."""
        kernel = self.matrix().view(self.weight_shape)
        return F.conv2d(input, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


class CompressedEmbedding(CompressedModule):
    """nn.Embedding; looks up packed rows and unpacks only those."""

    def __init__(self, layer: Layer, grid: Grid) -> None:
        super().__init__(layer, grid)
        self.num_embeddings, self.embedding_dim = self.matrix_shape
        self.padding_idx = layer.module.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the weight at `input`."""
        indices = input.reshape(-1)
        codes = unpack(self.codes.index_select(0, indices), self.grid.bits, self.embedding_dim)  # refuses index -1
        zeros = None if self.zeros is None else self.zeros.index_select(0, indices)
        rows = dequantise(codes, self.scales.index_select(0, indices), zeros, self.grid).to(self.dtype)
        return rows.view(*input.shape, self.embedding_dim)


class Tied(nn.Module):
    """A module that computes with another module's weight and holds none itself.

    The other module is referred to without being registered, so that its tensors are saved and moved once. A deep copy
    of the model copies both, and the copy refers to the copy.
    """

    def __init__(self, home: CompressedModule, bias: nn.Parameter | None) -> None:
        super().__init__()
        object.__setattr__(self, "home", home)
        self.register_parameter("bias", bias)
        self.training = home.training

    home: CompressedModule
    bias: nn.Parameter | None

    @property
    def weight(self) -> Tensor:
        """The home's weight."""
        return self.home.weight


class TiedLinear(Tied):
    """A linear layer with the weight of a compressed embedding (or of another linear layer)."""

    def __init__(self, home: CompressedModule, bias: nn.Parameter | None) -> None:
        super().__init__(home, bias)
        self.out_features, self.in_features = home.matrix_shape

    def forward(self, input: Tensor) -> Tensor:
        """Computes y = x W' + b."""
        return F.linear(input, self.home.matrix(), self.bias)


class TiedEmbedding(Tied):
    """An embedding with the weight of another compressed embedding."""

    def __init__(self, home: CompressedModule, bias: nn.Parameter | None) -> None:
        super().__init__(home, bias)
        self.num_embeddings, self.embedding_dim = home.matrix_shape
        self.padding_idx = getattr(home, "padding_idx", None)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the home's weight at `input`."""
        if isinstance(self.home, CompressedEmbedding):
            return self.home.forward(input)
        return F.embedding(input, self.home.matrix())


COMPRESSED: dict[LayerKind, type[CompressedModule]] = {
    "linear": CompressedLinear,
    "conv1d": CompressedLinear,
    "conv2d": CompressedConv2d,
    "embedding": CompressedEmbedding,
}

TIED: dict[LayerKind, type[Tied]] = {"linear": TiedLinear, "embedding": TiedEmbedding}
