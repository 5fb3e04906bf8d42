"""Linear layers as products of whole numbers, with a range for each token: the run time "fast".

    v = column_steps x        a = max |v| of a token        u = round(127 v / a) + 128, uint8
    y = a / 127 row_steps ((u - 128) Z') + v_far R' + b

Z are codes within +-64, so that the processor's `vpmaddubsw`, where it has nothing better, cannot saturate: two
products of 255 and 64 fit into 16 bits. Columns with a code beyond are clipped, and R, what they lack, is multiplied in
floating point. Entropy-coded layers have nearly all codes within, and column steps that are small where inputs are
large: what others learn as smoothing. On grids whose scales differ within a row, W is rounded anew to +-63 steps of a
row, which is done when a file is loaded and costs more than the inputs' 8 bits do.

In the file, Z takes the bits that it needs: most columns at one width, the others at the width of the widest.
"""

import torch
from torch import Tensor, nn

from hf_lossless.checkpoints.exports.onnx.folded import FoldedMatrix
from hf_lossless.checkpoints.exports.onnx.levels import Levels, split, width_of
from hf_lossless.checkpoints.exports.onnx.operators import matmul_integer_to_float, quantize
from hf_lossless.checkpoints.exports.onnx.planes import Planes

LARGEST = 64
"""Of codes: 2 * 255 * 64 < 2^15."""

_ROUNDED_TO = 63


class SharedInputs:
    """What has been made of an input, for other layers with the same input and column steps: query, key and value."""

    def __init__(self) -> None:
        self._made: list[tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor]]] = []

    def quantised(
        self, input: Tensor, column_steps: Tensor | None, known: Tensor | None, constants: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gives v, u and a of the module's formula.

        Args:
            input: x.
            column_steps: As the trace has them.
            known: Their values.
            constants: 1 / 127 and 128.
        """
        for other, steps, made in self._made:
            same = steps is known or (steps is not None and known is not None and torch.equal(steps, known))
            if other is input and same:
                return made
        scaled = input if column_steps is None else input * column_steps
        largest = scaled.abs().amax(-1, keepdim=True) + 1e-30
        made = scaled, quantize(scaled / largest, *constants), largest
        self._made.append((input, known, made))
        return made


class Int8Linear(nn.Module):
    """A linear layer of whole numbers."""

    column_steps: Tensor | None
    row_steps: Tensor
    order: Tensor
    far: Tensor
    step: Tensor
    zero: Tensor

    def __init__(self, levels: Levels, shared: SharedInputs) -> None:
        """Packs a matrix.

        Args:
            levels: The matrix.
            shared: What other layers have made of their inputs.
        """
        super().__init__()
        self.shared, self.known_steps = shared, levels.column_steps
        self.register_buffer("column_steps", levels.column_steps)
        self.register_buffer("step", torch.tensor(1 / 127))
        self.register_buffer("zero", torch.tensor(128, dtype=torch.uint8))
        self.exact = levels.one_group and levels.zeros is None
        self.has_far = False
        if not self.exact:
            # Column steps belong to coded layers, which have one group.
            self.matrix = FoldedMatrix(levels)
            with torch.no_grad():
                self.register_buffer("row_steps", _row_steps(levels))
            return
        halves = split(levels.codes, -LARGEST, LARGEST, axis=1)
        self.register_buffer("row_steps", levels.scales[:, 0].clone())
        columns = halves.near.T.contiguous()
        wide = _wide_columns(columns)
        self.register_buffer("order", torch.argsort(torch.cat([(~wide).nonzero()[:, 0], wide.nonzero()[:, 0]])))
        self.parts = nn.ModuleList(Planes(part) for part in (columns[~wide], columns[wide]) if len(part))
        self.has_far = len(halves.places) > 0
        if self.has_far:
            self.register_buffer("far", halves.places)
            self.rest = FoldedMatrix(Levels(halves.rest.T.contiguous(), levels.scales, len(halves.places)))

    def whole_numbers(self) -> Tensor:
        """Unpacks or rounds Z', int8 [in, out]."""
        if self.exact:
            parts: list[Tensor] = [part() for part in self.parts]
            columns = parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, self.order)
            return columns.to(torch.int8)
        matrix: Tensor = self.matrix()
        return (matrix / self.row_steps[:, None]).round().T.to(torch.int8)

    def forward(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Computes y, float32 [..., out]."""
        constants = self.step, self.zero
        scaled, whole, largest = self.shared.quantised(input, self.column_steps, self.known_steps, constants)
        output = matmul_integer_to_float(whole, self.whole_numbers(), self.step, self.row_steps, self.zero) * largest
        if self.has_far:
            output = output + nn.functional.linear(scaled.index_select(-1, self.far), self.rest())
        return output if bias is None else output + bias


def _row_steps(levels: Levels) -> Tensor:
    """Steps at which the largest weight of a row is 63, float32 [out]."""
    largest = levels.dense.abs().amax(1)
    return torch.where(largest > 0, largest / _ROUNDED_TO, 1.0)


def _wide_columns(columns: Tensor) -> Tensor:
    """Which columns are stored at the full width, so that all take the fewest bytes; bool [in]."""
    widths = torch.tensor([width_of(column) for column in columns])
    widest = int(widths.max())
    bits = [int((widths <= bits).sum()) * bits + int((widths > bits).sum()) * widest for bits in range(1, widest + 1)]
    return widths > 1 + bits.index(min(bits))
