"""A stored matrix as whole numbers with steps, however its module keeps it.

    W[o, i] = scales[o, g] column_steps[i] (codes[o, i] - zeros[o, g])        g = i // group_size

A grid of one bit has the levels -1/2 and 1/2: they become codes -1 and 1 at half the scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.coded import CodedModule
from hf_lossless.storage.modules.packed import PackedModule
from hf_lossless.storage.packing import unpack

Leaf = PackedModule | CodedModule
"""The modules that hold codes; those of other kinds consist of such and of plain layers."""


@dataclass(frozen=True)
class Levels:
    """A matrix as whole numbers and steps.

    Attributes:
        codes: int32 [out, in].
        scales: float32 [out, groups].
        group_size: Columns that share a scale; `in` where all do.
        column_steps: float32 [in]; None: all are 1.
        zeros: float32 [out, groups]; None: all are 0.
    """

    codes: Tensor
    scales: Tensor
    group_size: int
    column_steps: Tensor | None = None
    zeros: Tensor | None = None

    @property
    def one_group(self) -> bool:
        """Whether a whole row shares its scale."""
        return self.scales.shape[1] == 1

    @property
    def dense(self) -> Tensor:
        """The matrix W, float32 [out, in]."""
        values = self.codes.float() if self.zeros is None else self.codes - self._spread(self.zeros)
        values = values * self._spread(self.scales)
        return values if self.column_steps is None else values * self.column_steps

    def _spread(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.group_size, 1)[:, : self.codes.shape[1]]


@dataclass(frozen=True)
class Split:
    """Codes within bounds, and what some rows or columns lack beside them: `codes = near + rest`.

    Attributes:
        near: int32 [out, in], within the bounds.
        places: int64 [n], the rows or columns with codes beyond.
        rest: int32 [n, in] of rows, or [n, out] of columns.
    """

    near: Tensor
    places: Tensor
    rest: Tensor


def levels_of(module: Leaf) -> Levels:
    """Reads codes and steps of a loaded layer."""
    if isinstance(module, CodedModule):
        row_steps, column_steps = module.steps()
        codes = module.levels(torch.float32).to(torch.int32)
        return Levels(codes, row_steps[:, None].clone(), codes.shape[1], column_steps.clone())
    (out_features, in_features), grid = module.matrix_shape, module.grid
    per_row = out_features * in_features // len(module.codes)
    codes = unpack(module.codes, grid.bits, per_row).view(out_features, in_features).to(torch.int32)
    scales, size = module.scales.float(), min(grid.group_size or in_features, in_features)
    if module.zeros is not None:
        middle = 2 ** (grid.bits - 1)
        return Levels(codes - middle, scales, size, zeros=module.zeros.float() - middle)
    if grid.bits == 1:
        return Levels(2 * codes - 1, scales / 2, size)
    return Levels(codes - 2 ** (grid.bits - 1), scales, size)


def split(codes: Tensor, lowest: int, highest: int, axis: int) -> Split:
    """Clips codes, and keeps what the rows (axis 0) or columns (axis 1) with codes beyond the bounds lose by it."""
    near = codes.clamp(lowest, highest)
    rest = codes - near if axis == 0 else (codes - near).T
    places = rest.any(1).nonzero()[:, 0]
    return Split(near, places, rest[places])


def width_of(codes: Tensor) -> int:
    """Bits of a code between the least and the largest: the codes lie in -2^(b-1) .. 2^(b-1) - 1."""
    if not codes.numel():
        return 1
    lowest, highest = int(codes.min()), int(codes.max())
    return max((-lowest - 1 if lowest < 0 else 0).bit_length(), highest.bit_length() if highest > 0 else 0) + 1


def leaves(model: torch.nn.Module) -> dict[str, Leaf]:
    """Finds the modules of a model that hold codes, parts of factorised layers included."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CompressedModule) and isinstance(module, Leaf)
    }
