"""A matrix packed in the file and made whole when it is loaded, for what needs it in floating point.

    W = scales (codes - zeros) column_steps

All of it are constants, so that onnxruntime computes W once: convolutions then run as those of any other model do,
batch norms folded into them where the graph allows.
"""

from torch import Tensor, nn

from hf_lossless.checkpoints.exports.onnx.levels import Levels
from hf_lossless.checkpoints.exports.onnx.planes import Planes


class FoldedMatrix(nn.Module):
    """A matrix `W [out, in]` of packed codes."""

    scales: Tensor
    zeros: Tensor | None
    column_steps: Tensor | None

    def __init__(self, levels: Levels) -> None:
        """Packs a matrix; the last group of a row is filled up with zeros."""
        super().__init__()
        self.group_size, self.columns = levels.group_size, levels.codes.shape[1]
        self.groups = levels.scales.shape[1]
        filled = nn.functional.pad(levels.codes, (0, self.groups * self.group_size - self.columns))
        self.codes = Planes(filled)
        self.register_buffer("scales", levels.scales)
        self.register_buffer("zeros", levels.zeros)
        self.register_buffer("column_steps", levels.column_steps)

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """Unpacks W, float32 [out, in]; or some rows of it, [..., in]."""
        values: Tensor = self.codes(rows)
        if self.groups > 1:
            # Group by group: scales spread over the weights would be folded into the file by torch's own exporter.
            values = values.view(*values.shape[:-1], self.groups, self.group_size)
        if self.zeros is not None:
            values = values - self._of_groups(self.zeros, rows)
        values = values * self._of_groups(self.scales, rows)
        if self.groups > 1:
            values = values.flatten(-2)[..., : self.columns]
        return values if self.column_steps is None else values * self.column_steps

    def _of_groups(self, numbers: Tensor, rows: Tensor | None) -> Tensor:
        """One number for each group: [..., groups, 1], or [..., 1] where a row is one group."""
        found = numbers if rows is None else nn.functional.embedding(rows, numbers)
        return found.unsqueeze(-1) if self.groups > 1 else found
