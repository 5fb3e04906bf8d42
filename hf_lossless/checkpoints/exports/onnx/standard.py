"""Matrices that stay packed in memory and are multiplied in floating point, by standard operators of opset 21 alone.

    DequantizeLinear (int4, int8 or int16; a scale for each row or each block) -> MatMul, Conv

onnxruntime makes MatMulNBits of it where it can, OpenVINO has its own way; where neither knows one, the matrix is made
anew at each call. The run time "standard" has all of it so, and "small" its convolutions.

torch has no tensors of 4 bits: such codes pass through the trace as int8, under a name that says so, and become INT4
when the graph is there (`pack_int4`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_lossless.checkpoints.exports.onnx.levels import Levels, width_of
from hf_lossless.checkpoints.exports.onnx.operators import dequantize

INT4_NAME = "codes_of_4_bits"
"""Of the buffers that hold codes from -8 to 7."""


class StandardMatrix(nn.Module):
    """A matrix that is made of its codes at each call, without its column steps.

    Attributes:
        transposed: Whether it is W' [in, out], as a MatMul takes it, or W [out, in].
    """

    scales: Tensor
    offsets: Tensor | None

    def __init__(self, levels: Levels, *, transposed: bool) -> None:
        """Takes in a matrix."""
        super().__init__()
        bits = width_of(levels.codes)
        self.codes_name = INT4_NAME if bits <= 4 else "codes"
        dtype = torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32
        self.group_size, self.columns, self.transposed = levels.group_size, levels.codes.shape[1], transposed
        self.block_size = 0 if levels.one_group else levels.group_size
        scales = levels.scales[:, 0] if levels.one_group else self._turned(levels.scales)
        offsets = None if levels.zeros is None else levels.zeros * levels.scales
        if offsets is not None and not levels.one_group:
            offsets = offsets.repeat_interleave(self.group_size, 1)[:, : self.columns]
        self.register_buffer(self.codes_name, self._turned(levels.codes).to(dtype))
        self.register_buffer("scales", scales.clone())
        self.register_buffer("offsets", None if offsets is None else self._turned(offsets))

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if self.transposed else matrix

    def forward(self) -> Tensor:
        """Computes the matrix from its codes, float32."""
        along_inputs = 0 if self.transposed else 1
        axis = along_inputs if self.block_size else 1 - along_inputs
        values = dequantize(self.get_buffer(self.codes_name), self.scales, axis, self.block_size)
        return values if self.offsets is None else values - self.offsets


class StandardWeight(nn.Module):
    """A whole weight `W [out, in]`, for a convolution or a factor."""

    column_steps: Tensor | None

    def __init__(self, levels: Levels) -> None:
        """Takes in a matrix."""
        super().__init__()
        self.matrix = StandardMatrix(levels, transposed=False)
        self.register_buffer("column_steps", levels.column_steps)

    def forward(self) -> Tensor:
        """Computes W, float32 [out, in]."""
        values: Tensor = self.matrix()
        return values if self.column_steps is None else values * self.column_steps


class StandardLinear(nn.Module):
    """A linear layer with such a matrix."""

    column_steps: Tensor | None

    def __init__(self, levels: Levels) -> None:
        """Takes in a matrix."""
        super().__init__()
        self.matrix = StandardMatrix(levels, transposed=True)
        self.register_buffer("column_steps", levels.column_steps)

    def forward(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Computes y, float32 [..., out]."""
        matrix: Tensor = self.matrix()
        output = (input if self.column_steps is None else input * self.column_steps) @ matrix
        return output if bias is None else output + bias


def pack_int4(model: Any) -> None:
    """Gives the codes of 4 bits their type in a finished graph (an `onnx_ir.Model`), in place."""
    import ml_dtypes
    import onnx_ir

    for name, value in model.graph.initializers.items():
        if name.rpartition(".")[2] == INT4_NAME:
            numbers = value.const_value.numpy().astype(ml_dtypes.int4)
            value.const_value = onnx_ir.Tensor(numbers, name=name)
            value.dtype = onnx_ir.DataType.INT4
