"""Whole numbers in as many bits as they need, unpacked by standard operators (BitwiseAnd, Mul).

A code of b bits is cut into planes of 8, 4, 2 and 1 bits, as b is a sum of these: 3 = 2 + 1, 7 = 4 + 2 + 1. In each
plane a byte holds whole pieces of consecutive codes of a row, the first in the lowest bits. What is made of constants
alone onnxruntime computes once, when a file is loaded: a file may be smaller than what its run time needs.

A piece is masked where it is and multiplied to its place, exactly in float32. BitShift would be the operator for it, in
whose place OpenVINO 2026.4 divides and rounds.
"""

import torch
from torch import Tensor, nn

from hf_lossless.checkpoints.exports.convert import pack_bytes
from hf_lossless.checkpoints.exports.onnx.levels import width_of
from hf_lossless.checkpoints.exports.onnx.operators import bits_of


def planes_of(bits: int) -> tuple[int, ...]:
    """Computes the widths of the planes of a code, the lowest bits first.

    Example:
        >>> planes_of(7)
        (4, 2, 1)
    """
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


class Planes(nn.Module):
    """Codes [rows, columns], packed row by row; beyond 8 bits they are int16 or int32.

    Attributes:
        bits: Width of a code.
        middle: What was added to all of them to have none below zero.
    """

    def __init__(self, codes: Tensor) -> None:
        """Packs codes.

        Args:
            codes: int32 [rows, columns].
        """
        super().__init__()
        self.bits, self.columns = width_of(codes), codes.shape[1]
        self.middle = 2 ** (self.bits - 1)
        if self.bits > 8:
            self.register_buffer("whole", codes.to(torch.int16 if self.bits <= 16 else torch.int32))
            return
        shifted, used = codes + self.middle, 0
        for width in planes_of(self.bits):
            piece = torch.bitwise_right_shift(shifted, used) & (2**width - 1)
            self.register_buffer(f"plane_{width}", pack_bytes(piece.to(torch.uint8), width))
            shifts = torch.arange(0, 8, width)
            masks = torch.bitwise_left_shift(torch.tensor(2**width - 1), shifts)
            self.register_buffer(f"masks_{width}", masks.to(torch.uint8))
            self.register_buffer(f"places_{width}", 2.0 ** (used - shifts))
            used += width

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """Unpacks the codes, float32 [rows, columns]; or those of some rows, [..., columns]."""
        if self.bits > 8:
            whole = self.get_buffer("whole")
            return (whole if rows is None else nn.functional.embedding(rows, whole)).float()
        total: Tensor | None = None
        for width in planes_of(self.bits):
            plane = self.get_buffer(f"plane_{width}")
            packed = (plane if rows is None else nn.functional.embedding(rows, plane)).unsqueeze(-1)
            pieces = bits_of(packed, self.get_buffer(f"masks_{width}")).float() * self.get_buffer(f"places_{width}")
            part = pieces.flatten(-2)
            if part.shape[-1] > self.columns:
                part = part[..., : self.columns]
            total = part if total is None else total + part
        assert total is not None  # a code has a bit
        codes: Tensor = total - self.middle
        return codes
