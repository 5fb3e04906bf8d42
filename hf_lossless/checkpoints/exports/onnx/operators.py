"""The ONNX operators that torch has none for, as functions that can be traced.

Each stands for one node; under eager execution they give tensors of the right shape without values.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's own operators."""

INT8 = 3
"""onnx.TensorProto.INT8."""


def matmul_nbits(
    input: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, block_size: int, level: int
) -> Tensor:
    """Computes x W' of packed blocks: MatMulNBits.

    Args:
        input: x [..., in].
        packed: uint8 [out, blocks, block_size * bits / 8], the first code in the lowest bits.
        scales: float32 [out * blocks].
        zeros: float32 [out * blocks]; None: 2^(bits-1).
        bits: 2, 4 or 8.
        block_size: A power of two from 16 on.
        level: What inputs are computed in: 0 for floating point, 4 for 8 bits with a range for each block.
    """
    out_features = packed.shape[0]
    attributes = {"K": input.shape[-1], "N": out_features, "bits": bits, "block_size": block_size}
    return _node(
        f"{MICROSOFT}::MatMulNBits",
        (input, packed, scales) if zeros is None else (input, packed, scales, zeros),
        {**attributes, "accuracy_level": level},
        input.dtype,
        (*input.shape[:-1], out_features),
    )


def matmul_integer_to_float(
    input: Tensor, matrix: Tensor, input_scale: Tensor, matrix_scales: Tensor, input_zero: Tensor
) -> Tensor:
    """Computes `input_scale matrix_scales ((u - zero) B)` of whole numbers: MatMulIntegerToFloat.

    Args:
        input: u, uint8 [..., in].
        matrix: B, int8 [in, out].
        input_scale: float32 [].
        matrix_scales: float32 [out].
        input_zero: uint8 [].
    """
    shape = (*input.shape[:-1], matrix.shape[1])
    inputs = (input, matrix, input_scale, matrix_scales, input_zero)
    return _node(f"{MICROSOFT}::MatMulIntegerToFloat", inputs, {}, torch.float32, shape)


def quantize(input: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Rounds x / scale + zero to uint8: QuantizeLinear."""
    return _node("QuantizeLinear", (input, scale, zero), {}, torch.uint8, input.shape)


def dequantize(codes: Tensor, scales: Tensor, axis: int, block_size: int = 0) -> Tensor:
    """Computes scale times code: DequantizeLinear.

    Args:
        codes: Of int8, int16 or int32, of any shape.
        scales: float32: one for each index of the axis, or, with a block size, one for each block along it.
        axis: The axis.
        block_size: Consecutive codes that share a scale; 0: no blocks.
    """
    attributes = {"axis": axis} if block_size == 0 else {"axis": axis, "block_size": block_size}
    return _node("DequantizeLinear", (codes, scales), attributes, torch.float32, codes.shape)


def shift_right(codes: Tensor, places: Tensor) -> Tensor:
    """Shifts uint8 codes, one shift for each element of the last axis, which is 1 in `codes`: BitShift."""
    return _node("BitShift", (codes, places), {"direction": "RIGHT"}, torch.uint8, (*codes.shape[:-1], places.shape[0]))


def bits_of(codes: Tensor, mask: Tensor) -> Tensor:
    """Keeps the bits of a mask: BitwiseAnd."""
    return _node("BitwiseAnd", (codes, mask), {}, torch.uint8, codes.shape)


def _node(
    name: str, inputs: Sequence[Tensor], attributes: dict[str, Any], dtype: torch.dtype, shape: Sequence[Any]
) -> Tensor:
    made: Tensor = torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=dtype, shape=tuple(shape), version=1 if "::" in name else None
    )
    return made
