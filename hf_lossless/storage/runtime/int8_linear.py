"""Linear layers in 8-bit whole numbers, with a range for each token.

    v = column_steps x           a = max_i |v_i|           y = a row_steps Z q(v / a) + b

Z are codes up to 64 in size and q rounds a number of [-1, 1] to 8 bits. The kernels (FBGEMM) know one range for a whole
tensor; a token that was divided by its largest number fills that range, so that one is enough.

Two things make it safe on processors without VNNI. `vpmaddubsw` adds two products of 8-bit numbers in 16 bits, which
saturates beyond 255 * 64 * 2: no code here is larger. And `column_steps` are small where inputs are large, so that v is
smooth already (what SmoothQuant, arXiv 2211.10438, has to learn).

Coded layers keep their own codes: Z is exact. The few columns that hold a code beyond 64 are multiplied in float32
beside it (`far`). Packed grids have steps that change within a row and are put on two rows of codes,
`W = row_steps (Z + Z' / 128)`, which is 13 bits, so that rounding them anew costs nothing; one call does both.
"""

import math
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lossless.storage.runtime.form import Form

LARGEST_SAFE = 64
"""Codes up to this size do not saturate."""

_ENGINE = "fbgemm"  # it alone does not keep the weight a second time
_SECOND = 128.0  # how much finer the second row of codes is
_TINY = torch.finfo(torch.float32).tiny
_engine_lock = threading.Lock()


def int8_available() -> bool:
    """Returns whether this build of torch has the kernels for this processor."""
    return _ENGINE in torch.backends.quantized.supported_engines


def pack_rows(codes: Tensor, row_steps: Tensor) -> Any:
    """Packs the weight `row_steps codes` for FBGEMM, in one byte a weight, from which the codes can be unpacked."""
    steps = row_steps.double().clamp_min(1e-30)  # steps of zero are refused
    with _engine_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # that quantised tensors are not to be developed on
        weight = torch._make_per_channel_quantized_tensor(
            codes.contiguous(), steps, torch.zeros(len(steps), dtype=torch.long), 0
        )
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = _ENGINE
        try:
            return torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = before


def unpack_rows(packed: Any) -> Tensor:
    """Unpacks the codes that `pack_rows` packed."""
    weight, _ = torch.ops.quantized.linear_unpack(packed)
    codes: Tensor = weight.int_repr()
    return codes


@dataclass(frozen=True)
class FarColumns:
    """Columns of a matrix that hold a code beyond `LARGEST_SAFE`.

    Attributes:
        numbers: Which, int64 [far].
        weight: Their weights, float32 [out, far].
        codes: Their codes as the layer has them, int8 [out, far].
    """

    numbers: Tensor
    weight: Tensor
    codes: Tensor


class Int8Linear(Form):
    """A linear layer in whole numbers; see the module."""

    def __init__(
        self,
        codes: Tensor,
        row_steps: Tensor,
        *,
        column_steps: Tensor | None = None,
        far: FarColumns | None = None,
        two_rows: bool = False,
    ) -> None:
        """Packs codes.

        Args:
            codes: Z, int8 [out, in], at most `LARGEST_SAFE` in size; Z and Z' [2 out, in] where there are two rows.
            row_steps: float32, as many.
            column_steps: float32 [in], zero where a column is far; None: all are 1.
            far: The far columns, whose codes are zero in `codes`.
            two_rows: Whether each output has two rows of codes.
        """
        num_rows, self.in_features = codes.shape
        super().__init__(num_rows // 2 if two_rows else num_rows)
        self.row_steps, self.column_steps, self.far, self.two_rows = row_steps, column_steps, far, two_rows
        self.holds_codes = not two_rows
        self.packed = pack_rows(codes, row_steps)

    @classmethod
    def of_codes(cls, codes: Tensor, levels: Tensor, row_steps: Tensor, column_steps: Tensor) -> "Int8Linear":
        """Makes the form of a coded layer from its own codes.

        Args:
            codes: int8 [out, in], zero where a code is beyond a byte.
            levels: The same as float32, with all codes.
            row_steps: float32 [out].
            column_steps: float32 [in].
        """
        numbers = (levels.abs() > LARGEST_SAFE).any(0).nonzero().squeeze(1)
        if not len(numbers):
            return cls(codes, row_steps, column_steps=column_steps)
        weight = levels[:, numbers] * column_steps[numbers] * row_steps[:, None]
        far = FarColumns(numbers, weight, codes[:, numbers])
        near = codes.index_fill(1, numbers, 0)
        return cls(near, row_steps, column_steps=column_steps.index_fill(0, numbers, 0), far=far)

    @classmethod
    def of_weight(cls, weight: Tensor) -> "Int8Linear":
        """Rounds any weight, float32 [out, in], to 13 bits of each row's largest value."""
        steps = weight.abs().amax(1).div_(LARGEST_SAFE - 1).clamp_min_(_TINY)
        scaled = weight / steps[:, None]
        first = scaled.round()
        second = scaled.sub_(first).mul_(_SECOND).round_().clamp_(-LARGEST_SAFE, LARGEST_SAFE)
        codes = torch.cat([first, second]).to(torch.int8)
        return cls(codes, torch.cat([steps, steps / _SECOND]), two_rows=True)

    def product(self, input: Tensor) -> Tensor:
        """Computes W x; an input with a number that is not finite is computed in floating point, as a whole."""
        if not input.numel():
            return input.new_zeros(*input.shape[:-1], self.out_features)
        if input.dim() == 1:  # the kernels want rows
            return self.product(input[None])[0]
        scaled = input if self.column_steps is None else input * self.column_steps
        largest = scaled.abs().amax(-1, keepdim=True)
        if not math.isfinite(largest.sum().item()):
            return F.linear(input, self._weight())
        scaled = scaled / largest.clamp_min_(_TINY)
        output: Tensor = torch.ops.quantized.linear_dynamic(scaled, self.packed, False)
        if self.two_rows:
            output = output[..., : self.out_features] + output[..., self.out_features :]
        output = output.mul_(largest)
        if self.far is not None:
            output += F.linear(input.index_select(-1, self.far.numbers), self.far.weight)
        return output

    def _weight(self) -> Tensor:
        """W, float32 [out, in]."""
        weight = unpack_rows(self.packed).float().mul_(self.row_steps[:, None])
        if self.two_rows:
            weight = weight[: self.out_features] + weight[self.out_features :]
        if self.column_steps is not None:
            weight *= self.column_steps
        if self.far is not None:
            weight[:, self.far.numbers] = self.far.weight
        return weight

    def codes(self) -> Tensor | None:
        """Returns the packed codes, or None where there are two rows of them, which are not the layer's own."""
        if self.two_rows:
            return None
        codes = unpack_rows(self.packed)
        if self.far is not None:
            codes[:, self.far.numbers] = self.far.codes
        return codes

    @property
    def nbytes(self) -> int:
        """One or two bytes a weight, beside the steps (float64 among them) and the far columns."""
        far = 0 if self.far is None else self.far.weight.nbytes + self.far.codes.nbytes
        return len(self.row_steps) * (self.in_features + 16) + 4 * self.in_features + far

    def __getstate__(self) -> dict[str, Any]:
        """Codes in the place of packed ones, which no other process could read.

        By value: torch hands tensors to other processes as shared memory, and this one would be gone by then.
        """
        return {**self.__dict__, "packed": unpack_rows(self.packed).numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Packs the codes again."""
        super().__setstate__({**state, "packed": pack_rows(torch.from_numpy(state["packed"]), state["row_steps"])})
