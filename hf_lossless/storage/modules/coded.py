"""Layers with entropy-coded codes, which are decoded once, when they are loaded.

    coded            uint8   what is saved: steps, models and stream of the whole matrix (see `storage.entropy.matrix`)
                             empty where it was freed after decoding; encoded again, to the same bytes, when needed
    bias             of the original, where it had one

and, decoded from it and not saved,

    codes            int8    [out, in]
    row_steps        float32 [out]
    column_steps     float32 [in]
    far_positions: int64, far_codes float32: positions and values of the few codes beyond a byte

An embedding with codes beyond a byte finds those of a row in lists of equal length, so that shapes do not depend on the
indices:

    far_rows         int32   [vocabulary]      index of each row's list; list 0 is that of all rows without such codes
    far_columns      int64   [lists, longest]  columns, padded with 0
    far_lists        float32 [lists, longest]  codes, padded with 0

The weight is `W = row_steps code column_steps`. A full-precision matrix is in memory only while a layer runs; a linear
layer computes `y = row_steps (Z (column_steps x))` and never scales the matrix.
"""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lossless.errors import CheckpointError
from hf_lossless.storage.entropy.coder import Kernel
from hf_lossless.storage.entropy.frequencies import MalformedCode
from hf_lossless.storage.entropy.matrix import CodedMatrix, decode, encode
from hf_lossless.storage.layers import Layer, LayerKind
from hf_lossless.storage.modules.activations import keeping_dtype
from hf_lossless.storage.modules.base import CompressedModule, WholeConv2d, WholeEmbedding, WholeLinear
from hf_lossless.storage.values import EncodedMatrix

_DECODED = ("codes", "row_steps", "column_steps", "far_positions", "far_codes")
_FAR_ROWS = ("far_rows", "far_columns", "far_lists")


class CodedModule(CompressedModule):
    """Base of the entropy-coded layers: the coded bytes and what is decoded from them.

    Attributes:
        coded: The coded bytes; empty where they were freed.
        num_bytes: Number of coded bytes.
        codes: The decoded codes; None (as are the steps) before decoding, and where the run-time form holds the codes.
    """

    coded: Tensor
    num_bytes: int
    codes: Tensor | None
    row_steps: Tensor | None
    column_steps: Tensor | None
    far_positions: Tensor | None
    far_codes: Tensor | None
    far_rows: Tensor | None
    far_columns: Tensor | None
    far_lists: Tensor | None

    def __init__(self, layer: Layer, num_bytes: int) -> None:
        """Makes an empty module for `layer`, on its device; it is filled by `store`, or by loading a file and `decode`.

        Args:
            layer: The layer.
            num_bytes: Bytes of the coded matrix.
        """
        super().__init__(layer)
        self.num_bytes = num_bytes
        self.register_buffer("coded", torch.empty(num_bytes, dtype=torch.uint8, device=layer.weight.device))
        for name in (*_DECODED, *_FAR_ROWS):
            self.register_buffer(name, None, persistent=False)

    def store(self, values: EncodedMatrix) -> None:
        """Stores a matrix and its coded bytes."""
        self.coded.copy_(torch.from_numpy(values.stored))
        self._take(values.matrix)

    def decode(self, name: str, kernel: Kernel | None = None) -> None:
        """Decodes the loaded bytes.

        Args:
            name: The layer's name, for error messages.
            kernel: The decoder; None: chosen for a single layer of this size.

        Raises:
            CheckpointError: The bytes were cut or changed, or are no coded matrix.
            ConfigurationError: The bytes are of version 1, and the library that reads it is not installed.
        """
        try:
            matrix = decode(self.coded.cpu().numpy(), self.matrix_shape, kernel)
        except MalformedCode as error:
            raise CheckpointError(
                f"the tensor '{name}.coded' cannot be decoded: {error}. Take the folder again from where it came from."
            ) from error
        self._take(matrix)

    def _take(self, matrix: CodedMatrix) -> None:
        self.form = None
        device = self.coded.device
        self.codes = torch.from_numpy(matrix.codes).to(device)
        self.row_steps = torch.from_numpy(matrix.row_steps).to(device)
        self.column_steps = torch.from_numpy(matrix.column_steps).to(device)
        self.far_positions = torch.from_numpy(matrix.far_positions).to(device)
        self.far_codes = torch.from_numpy(matrix.far_codes).to(device, torch.float32)
        if len(self.far_codes):
            self._list_far_codes(self.far_positions, self.far_codes)
        self.renew()

    def _list_far_codes(self, positions: Tensor, codes: Tensor) -> None:
        """Sorts the codes beyond a byte into lists, one for each row that has any."""
        vocabulary, dim = self.matrix_shape
        found, list_of, counts = torch.unique_consecutive(positions // dim, return_inverse=True, return_counts=True)
        place = torch.arange(len(codes), device=codes.device) - (counts.cumsum(0) - counts)[list_of]
        shape = (len(found) + 1, int(counts.max()))
        self.far_columns, self.far_lists = positions.new_zeros(shape), codes.new_zeros(shape)
        self.far_columns[list_of + 1, place] = positions % dim
        self.far_lists[list_of + 1, place] = codes
        self.far_rows = torch.zeros(vocabulary, dtype=torch.int32, device=codes.device)
        self.far_rows[found] = torch.arange(1, len(found) + 1, dtype=torch.int32, device=codes.device)

    def near_codes(self) -> Tensor | None:
        """Returns the codes, int8 [out, in], of the layer or of its run-time form; None before they are decoded."""
        return self.codes if self.codes is not None or self.form is None else self.form.codes()

    def recode(self) -> None:
        """Encodes the codes again where the bytes were freed; the bytes are the same as before."""
        if len(self.coded):
            return
        near, (row_steps, column_steps) = self.near_codes(), self.steps()
        assert near is not None and self.far_positions is not None and self.far_codes is not None
        matrix = CodedMatrix(
            near.cpu().numpy(),
            row_steps.cpu().numpy(),
            column_steps.cpu().numpy(),
            self.far_positions.cpu().numpy(),
            self.far_codes.cpu().numpy().astype(np.int32),
        )
        self.coded = torch.from_numpy(encode(matrix)).to(self.coded.device)
        self.num_bytes = len(self.coded)

    def forget_bytes(self) -> None:
        """Frees the coded bytes, where they have been decoded."""
        if self.row_steps is not None:
            self.coded = self.coded.new_empty(0)

    def levels(self, dtype: torch.dtype) -> Tensor:
        """Computes the codes Z [out, in], including those beyond a byte."""
        near = self.near_codes()
        assert near is not None and self.far_positions is not None and self.far_codes is not None
        levels = near.to(dtype)
        if len(self.far_positions):
            levels.view(-1)[self.far_positions] = self.far_codes.to(dtype)
        return levels

    def steps(self) -> tuple[Tensor, Tensor]:
        """Returns the steps of rows and columns, float32."""
        assert self.row_steps is not None and self.column_steps is not None
        return self.row_steps, self.column_steps

    def matrix(self) -> Tensor:
        """Rebuilds the weight `W [out, in]` in the module's dtype at each call; on meta before decoding."""
        if self.row_steps is None:  # some models initialise their weights before `decode` can have run
            return torch.empty(self.matrix_shape, dtype=self.dtype, device="meta")
        row_steps, column_steps = self.steps()
        return self.levels(torch.float32).mul_(column_steps).mul_(row_steps[:, None]).to(self.dtype)

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Computes y = row_steps (Z (column_steps x)) + b."""
        device = input.device.type
        autocast = torch.is_autocast_enabled(device)
        if (torch.get_autocast_dtype(device) if autocast else self.dtype) is torch.float16:
            # Z, and Z (column_steps x), may overflow its range where y does not.
            return F.linear(input, self.matrix(), bias)
        row_steps, column_steps = self.steps()
        output = F.linear(input * column_steps.to(input.dtype), self.levels(self.dtype))
        output = output * row_steps.to(output.dtype)
        return output if bias is None else output + bias.to(output.dtype)  # autocast

    def embedding(self, indices: Tensor) -> Tensor:
        """Looks up rows of the weight; only these are rebuilt."""
        near = self.near_codes()
        assert near is not None
        row_steps, column_steps = self.steps()
        flat = indices.reshape(-1)
        rows = near.index_select(0, flat).float()  # refuses index -1
        if self.far_lists is not None and self.far_columns is not None and self.far_rows is not None:
            lists = self.far_rows.index_select(0, flat)
            columns, codes = self.far_columns.index_select(0, lists), self.far_lists.index_select(0, lists)
            rows.scatter_add_(1, columns, codes)  # the near codes are zero there
        rows = rows.mul_(column_steps).mul_(row_steps.index_select(0, flat)[:, None]).to(self.dtype)
        return rows.view(*indices.shape, rows.shape[1])

    def renew(self) -> None:
        """Frees the codes where the run-time form holds them; an embedding keeps its own for look-ups."""
        super().renew()
        if self.form is not None and self.form.holds_codes and self.kind != "embedding":
            self.codes = None

    def release(self) -> None:
        """Moves the codes that the run-time form holds back into the layer."""
        self.codes = self.near_codes()
        super().release()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves as any module does, but a cast keeps the steps' dtype and only sets `self.dtype`."""
        return super()._apply(
            keeping_dtype(fn, (self.row_steps, self.column_steps, self.far_codes, self.far_lists)), recurse
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Saves the coded bytes; where they were freed, they are encoded again for this call."""
        freed = not len(self.coded)
        self.recode()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if freed:
            self.forget_bytes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loads a layer's coded bytes and decodes them. The stored length may differ from the present one."""
        coded = state_dict.get(f"{prefix}coded")
        if coded is not None and not self.coded.is_meta:
            self.coded, self.num_bytes = torch.empty_like(coded, device=self.coded.device), len(coded)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if coded is not None and not self.coded.is_meta:
            self.decode(prefix.removesuffix("."))

    def extra_repr(self) -> str:
        """Returns shape and average bits of a weight, for `print(model)`."""
        out_features, in_features = self.matrix_shape
        bits = 8 * self.num_bytes / (out_features * in_features)
        return f"{out_features}x{in_features}, bits={bits:.2f}, bias={self.bias is not None}"


class CodedLinear(WholeLinear, CodedModule):
    """nn.Linear, or transformers' Conv1D, whose weight is [in, out]."""


class CodedConv2d(WholeConv2d, CodedModule):
    """nn.Conv2d, grouped and depthwise too."""


class CodedEmbedding(WholeEmbedding, CodedModule):
    """nn.Embedding; rebuilds only the rows that it looks up."""


CODED: dict[LayerKind, type[CodedModule]] = {
    "linear": CodedLinear,
    "conv1d": CodedLinear,
    "conv2d": CodedConv2d,
    "embedding": CodedEmbedding,
}
