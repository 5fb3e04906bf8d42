"""Linear layers whose weights stay packed in memory (the run time "small"): onnxruntime's MatMulNBits.

    y = blocks(column_steps x) + v_rest R' + b

It has 2, 4 and 8 bits and one scale for each block of 16, 32, 64, 128 or 256 inputs. Codes of other widths move into
the next wider one exactly, a scale is repeated where its group is longer than a block, and zero points may be any
numbers. Where few columns of an entropy-coded layer need more bits than the others, they are clipped, and R, what they
lack, is multiplied in floating point.

Inputs are rounded to 8 bits with a range for each block of a token (accuracy level 4), which is two to three times as
fast as floating point (level 0) on processors without anything better; layers whose inputs the checkpoint itself puts
on a grid stay in floating point.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_lossless.checkpoints.exports.convert import NotConvertible, pack_bytes
from hf_lossless.checkpoints.exports.onnx.folded import FoldedMatrix
from hf_lossless.checkpoints.exports.onnx.levels import Levels, Split, split
from hf_lossless.checkpoints.exports.onnx.operators import matmul_nbits

_WIDTHS = (2, 4, 8)
_BLOCKS = (16, 32, 64, 128, 256)
_REST_BYTES = 4
"""Of a number in R, which is whole in memory."""


class _Layout(NamedTuple):
    """How a matrix lies in blocks."""

    bits: int
    block_size: int
    halves: Split


class BlockLinear(nn.Module):
    """A linear layer in packed blocks."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    column_steps: Tensor | None
    rest_columns: Tensor

    def __init__(self, levels: Levels, level: int) -> None:
        """Packs a matrix.

        Args:
            levels: The matrix.
            level: onnxruntime's accuracy level, 0 or 4.

        Raises:
            NotConvertible: Its groups are no whole number of blocks, or have zero points and codes of more than 4 bits.
        """
        super().__init__()
        self.bits, self.block_size, halves = _layout(levels)
        self.level = level
        out_features, in_features = levels.codes.shape
        blocks = -(-in_features // self.block_size)
        codes = nn.functional.pad(halves.near + 2 ** (self.bits - 1), (0, blocks * self.block_size - in_features))
        packed = pack_bytes(codes.to(torch.uint8).view(out_features * blocks, self.block_size), self.bits)
        self.register_buffer("packed", packed.view(out_features, blocks, -1))
        groups = torch.arange(blocks) * self.block_size // levels.group_size
        self.register_buffer("scales", levels.scales[:, groups].reshape(-1))
        zeros = None if levels.zeros is None else (levels.zeros[:, groups] + 2 ** (self.bits - 1)).reshape(-1)
        self.register_buffer("zeros", zeros)
        self.register_buffer("column_steps", levels.column_steps)
        self.has_rest = len(halves.places) > 0
        if self.has_rest:
            self.register_buffer("rest_columns", halves.places)
            self.rest = FoldedMatrix(Levels(halves.rest.T.contiguous(), levels.scales, len(halves.places)))

    def forward(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Computes y, float32 [..., out]."""
        scaled = input if self.column_steps is None else input * self.column_steps
        output = matmul_nbits(
            scaled, self.packed, self.scales, self.zeros, bits=self.bits, block_size=self.block_size, level=self.level
        )
        if self.has_rest:
            output = output + nn.functional.linear(scaled.index_select(-1, self.rest_columns), self.rest())
        return output if bias is None else output + bias


def _layout(levels: Levels) -> _Layout:
    """The width and the block size that take the least memory, rest included."""
    out_features, in_features = levels.codes.shape
    layouts = {}
    for bits in _WIDTHS:
        halves = split(levels.codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, axis=1)
        if len(halves.places) and not levels.one_group:
            continue
        if levels.zeros is not None and bits == 8:  # onnxruntime 1.31 multiplies these with whole zero points alone
            continue
        rest_bytes = len(halves.places) * out_features * _REST_BYTES
        for size in _BLOCKS:
            if levels.one_group or levels.group_size % size == 0:
                blocks = -(-in_features // size)
                layouts[blocks * out_features * (size * bits // 8 + 4) + rest_bytes] = _Layout(bits, size, halves)
    if not layouts:
        raise NotConvertible(
            f"its groups of {levels.group_size} inputs are no whole number of blocks of 16, or have zero points and "
            "more than 4 bits"
        )
    return layouts[min(layouts)]
