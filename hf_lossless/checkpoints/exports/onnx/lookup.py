"""Embeddings: the packed rows are looked up, and these alone are unpacked, in memory as in the file.

A few rows of an entropy-coded table have codes far beyond the others'. What they lack, codes clipped, is a small table
of its own: `slots` says for each row which line of it to add, and line 0 is zero.
"""

import torch
from torch import Tensor, nn

from hf_lossless.checkpoints.exports.onnx.folded import FoldedMatrix
from hf_lossless.checkpoints.exports.onnx.levels import Levels, split, width_of


class Lookup(nn.Module):
    """Rows of a packed matrix."""

    slots: Tensor

    def __init__(self, levels: Levels) -> None:
        """Packs a table at the width at which it takes the fewest bytes."""
        super().__init__()
        codes, (rows, columns) = levels.codes, levels.codes.shape
        widest = width_of(codes)
        row_widths = [int((codes.abs().amax(1) >= 2 ** (bits - 1)).sum()) for bits in range(widest)]  # 0 .. widest - 1
        costs = {
            bits: rows * columns * bits / 8 + 2 * (row_widths[bits] + 1) * columns + 4 * rows
            for bits in range(1, min(widest, 9))
        }
        costs[widest] = rows * columns * (widest if widest <= 8 else 16 if widest <= 16 else 32) / 8
        bits = min(costs, key=costs.__getitem__)
        self.has_rest = bits < widest
        if self.has_rest:
            halves = split(codes, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, axis=0)
            self.table = FoldedMatrix(
                Levels(halves.near, levels.scales, levels.group_size, levels.column_steps, levels.zeros)
            )
            slots = torch.zeros(rows, 1, dtype=torch.int32)
            slots[halves.places, 0] = torch.arange(1, len(halves.places) + 1, dtype=torch.int32)
            self.register_buffer("slots", slots)
            line_0 = (0, 0, 1, 0)
            rest, scales = (nn.functional.pad(one, line_0) for one in (halves.rest, levels.scales[halves.places]))
            self.lacking = FoldedMatrix(Levels(rest, scales, levels.group_size, levels.column_steps))
        else:
            self.table = FoldedMatrix(levels)

    def forward(self, indices: Tensor) -> Tensor:
        """Looks up rows of the matrix, float32 [..., in]."""
        rows: Tensor = self.table(indices)
        if not self.has_rest:
            return rows
        lacking: Tensor = self.lacking(nn.functional.embedding(indices, self.slots).squeeze(-1))
        return rows + lacking
