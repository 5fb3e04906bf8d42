"""Layers stored as two factors, `W [out, in] ~ L [out, r] @ R [r, in]`, or as a grid plus two factors.

A low-rank layer consists of two layers without bias, each in floating point or packed on a grid.

    right    R   the original's kind with r outputs (for an embedding: a linear layer)
    left     L   a layer of r inputs (for a convolution: a 1x1 convolution; for an embedding: an embedding of width r)
    base     a packed layer of the original's own shape, only where a grid is stored as well
    bias     of the original, where it had one

    y = left(right(x)) + base(x) + bias          rows at i = left(i) @ R + base(i)

Where the input is quantised, x is the quantised input, for right and base alike; the output of right stays in floating
point.

The product L R is never built: a layer takes r (out + in) multiplications instead of out * in, and an embedding looks
up only the rows it needs. A base is unpacked at each call, as a packed layer is.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.layers import Layer, LayerKind, kind_of
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.packed import PACKED, PackedModule
from hf_lossless.storage.plan import Grid, LowRank
from hf_lossless.storage.values import FactoredMatrix

PlainPart = nn.Linear | nn.Conv2d | nn.Embedding


class LowRankModule(CompressedModule):
    """Base of the low-rank layers.

    Attributes:
        left: Module with L as its weight.
        right: Module with R as its weight.
        base: Module with the grid that is added to the product; None where there is none.
    """

    left: PlainPart | PackedModule
    right: PlainPart | PackedModule
    base: PackedModule | None

    def __init__(self, layer: Layer, low_rank: LowRank, grid: Grid | None = None) -> None:
        """Makes an empty module for `layer`, on its device.

        Args:
            layer: The layer; a convolution in one group.
            low_rank: Rank and grids of the factors.
            grid: The base's grid; None: there is no base.
        """
        super().__init__(layer)
        self.rank = low_rank.rank
        self.base = None
        if grid is not None:
            self.base = PACKED[layer.kind](layer, grid)
            self.base.bias = None
            self.base.guarded = False
        left, right = self._plain_parts(layer, low_rank.rank)
        self.left = _empty_part(left, low_rank.left, layer)
        self.right = _empty_part(right, low_rank.right, layer)
        self.train(layer.module.training)

    @staticmethod
    @abstractmethod
    def _plain_parts(layer: Layer, rank: int) -> tuple[PlainPart, PlainPart]:
        """Makes left and right as plain layers on meta, so that torch's random generator is not advanced."""

    def store(self, values: FactoredMatrix) -> None:
        """Stores the factors, and the base where there is one."""
        _store(self.left, values.left)
        _store(self.right, values.right)
        if self.base is not None and values.base is not None:
            self.base.store(values.base)

    @property
    def left_matrix(self) -> Tensor:
        """Returns L [out, r], unpacked at each access where it is packed."""
        return _matrix(self.left)

    @property
    def right_matrix(self) -> Tensor:
        """Returns R [r, in], unpacked at each access where it is packed."""
        return _matrix(self.right)

    def matrix(self) -> Tensor:
        """Computes the weight `W [out, in]` as a product, in the module's dtype; forward passes do not call this."""
        product = self.left_matrix @ self.right_matrix
        return product if self.base is None else product + self.base.matrix()

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Computes y = (x R') L' + b, and adds the output of the base."""
        output = F.linear(F.linear(input, self.right_matrix), self.left_matrix, bias)
        return output if self.base is None else output + self.base.linear(input, None)

    def embedding(self, indices: Tensor) -> Tensor:
        """Looks up rows of L, multiplies them by R, and adds the rows of the base."""
        rows = F.embedding(indices, self.left_matrix) @ self.right_matrix
        return rows if self.base is None else rows + self.base.embedding(indices)

    def extra_repr(self) -> str:
        """Returns shape and rank, for `print(model)`."""
        out_features, in_features = self.matrix_shape
        return f"{out_features}x{in_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankLinear(LowRankModule):
    """nn.Linear, or transformers' Conv1D."""

    @staticmethod
    def _plain_parts(layer: Layer, rank: int) -> tuple[PlainPart, PlainPart]:
        out_features, in_features = layer.matrix.shape
        left = nn.Linear(rank, out_features, bias=False, device="meta")
        return left, nn.Linear(in_features, rank, bias=False, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """Computes y = (x R') L' + b, and adds the output of the base."""
        input = self.quantised(input)
        output: Tensor = self.left(self.right(input))
        if self.base is not None:
            output = output + self.base(input)
        return output if self.bias is None else output + self.bias.to(output.dtype)  # autocast


class LowRankConv2d(LowRankModule):
    """nn.Conv2d in one group: its own convolution to r channels, then a 1x1 convolution."""

    @staticmethod
    def _plain_parts(layer: Layer, rank: int) -> tuple[PlainPart, PlainPart]:
        original = layer.module
        assert isinstance(original, nn.Conv2d) and original.groups == 1
        right = nn.Conv2d(
            original.in_channels,
            rank,
            original.kernel_size,  # type: ignore[arg-type]  # its stubs say tuple[int, ...]
            original.stride,  # type: ignore[arg-type]
            original.padding,  # type: ignore[arg-type]
            original.dilation,  # type: ignore[arg-type]
            bias=False,
            device="meta",
        )
        return nn.Conv2d(rank, original.out_channels, 1, bias=False, device="meta"), right

    def forward(self, input: Tensor) -> Tensor:
        """Computes the two convolutions in sequence, and adds the output of the base."""
        input = self.quantised(input)
        output: Tensor = self.left(self.right(input))
        if self.base is not None:
            output = output + self.base(input)
        return output if self.bias is None else output + self.bias.to(output.dtype).view(-1, 1, 1)  # autocast


class LowRankEmbedding(LowRankModule):
    """nn.Embedding: looks up rows of L, and multiplies only these by R."""

    @staticmethod
    def _plain_parts(layer: Layer, rank: int) -> tuple[PlainPart, PlainPart]:
        original = layer.module
        assert isinstance(original, nn.Embedding)
        left = nn.Embedding(original.num_embeddings, rank, padding_idx=original.padding_idx, device="meta")
        return left, nn.Linear(original.embedding_dim, rank, bias=False, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """Looks up the rows of the weight at `input`."""
        return self.embedding(input)

    def embedding(self, indices: Tensor) -> Tensor:
        """Looks up rows of L, multiplies only these by R, and adds the rows of the base."""
        left_rows: Tensor = self.left(indices)
        rows = (left_rows @ self.right_matrix).to(left_rows.dtype)  # autocast
        return rows if self.base is None else rows + self.base(indices)


def _matrix(part: PlainPart | PackedModule) -> Tensor:
    return part.matrix() if isinstance(part, PackedModule) else part.weight.flatten(1)


def _store(part: PlainPart | PackedModule, values: QuantisedMatrix | Tensor) -> None:
    """Stores a factor in a packed module, or unchanged in a plain layer."""
    if isinstance(part, PackedModule):
        assert isinstance(values, QuantisedMatrix)
        part.store(values)
        return
    assert isinstance(values, Tensor)
    with torch.no_grad():
        part.weight.copy_(values.view(part.weight.shape))


def _empty_part(plain: PlainPart, grid: Grid | None, layer: Layer) -> PlainPart | PackedModule:
    """Makes an empty module for a factor, on the device of the layer's weight: plain, or packed on a grid."""
    weight = layer.weight
    room = torch.empty(plain.weight.shape, dtype=weight.dtype, device=weight.device)
    plain.weight = nn.Parameter(room, weight.requires_grad)
    kind = kind_of(plain)
    assert kind is not None
    if grid is None:
        return plain
    part = PACKED[kind](Layer(layer.name, plain, kind), grid)
    part.guarded = False
    return part


LOW_RANK: dict[LayerKind, type[LowRankModule]] = {
    "linear": LowRankLinear,
    "conv1d": LowRankLinear,
    "conv2d": LowRankConv2d,
    "embedding": LowRankEmbedding,
}
