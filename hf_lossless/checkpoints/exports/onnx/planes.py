"""Whole numbers in as many bits as they need, unpacked by standard operators (BitShift, BitwiseAnd).

A code of b bits is cut into planes of 8, 4, 2 and 1 bits, as b is a sum of these: 3 = 2 + 1, 7 = 4 + 2 + 1. In each
plane a byte holds whole pieces of consecutive codes of a row, the first in the lowest bits. What is made of constants
alone onnxruntime computes once, when a file is loaded: a file may be smaller than what its run time needs.
"""

import torch
from torch import Tensor, nn

from hf_lossless.checkpoints.exports.convert import pack_bytes
from hf_lossless.checkpoints.exports.onnx.levels import width_of
from hf_lossless.checkpoints.exports.onnx.operators import bits_of, shift_right


def planes_of(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, the lowest bits first.

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
            self.register_buffer(f"shifts_{width}", torch.arange(0, 8, width, dtype=torch.uint8))
            self.register_buffer(f"mask_{width}", torch.tensor(2**width - 1, dtype=torch.uint8))
            used += width

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """The codes, float32 [rows, columns]; or those of some rows, [..., columns]."""
        if self.bits > 8:
            whole = self.get_buffer("whole")
            return (whole if rows is None else nn.functional.embedding(rows, whole)).float()
        total, weight = None, 1
        for width in planes_of(self.bits):
            plane = self.get_buffer(f"plane_{width}")
            packed = plane if rows is None else nn.functional.embedding(rows, plane)
            if width < 8:
                pieces = shift_right(packed.unsqueeze(-1), self.get_buffer(f"shifts_{width}"))
                packed = bits_of(pieces, self.get_buffer(f"mask_{width}")).flatten(-2)
                if packed.shape[-1] > self.columns:
                    packed = packed[..., : self.columns]
            part = packed.float() if weight == 1 else packed.float() * weight
            total = part if total is None else total + part
            weight *= 2**width
        assert total is not None
        return total - self.middle
