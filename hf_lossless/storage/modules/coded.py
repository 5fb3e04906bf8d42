"""Layers whose codes are stored at their entropy, and decoded once, when they are loaded.

    coded            uint8   what is saved: steps, models and stream of the whole matrix (see `storage.entropy.matrix`)
                             empty once it has been decoded and forgotten; made again, the same, where it is asked for
    bias             as it came, where there was one

and, made of it and not saved,

    codes            int8    [out, in]
    row_steps        float32 [out]
    column_steps     float32 [in]
    far_positions: int64, far_codes float32: the few codes beyond a byte, exactly

An embedding that has such codes finds those of a row in lists of one length, so that shapes do not depend on indices:

    far_rows         int32   [vocabulary]      which list a row has; list 0 is that of all rows without such codes
    far_columns      int64   [lists, longest]  columns, filled up with 0
    far_lists        float32 [lists, longest]  codes, filled up with 0

The weight is `W = row_steps code column_steps`. A full-precision matrix stands in memory only while a layer runs; a
linear layer computes `y = row_steps (Z (column_steps x))` and has none of it scaled at all.
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
    """Base of the coded layers: the bytes, and what they decode to.

    Attributes:
        coded: The bytes; empty where they were forgotten.
        num_bytes: How many they are.
        codes: None until they are decoded, as are the others, and where the run-time form holds them.
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
        """Makes an empty module for `layer`, on its device; `store` fills it, or a file and then `decode`.

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
        """Takes in a matrix and its bytes."""
        self.coded.copy_(torch.from_numpy(values.stored))
        self._take(values.matrix)

    def decode(self, name: str, kernel: Kernel | None = None) -> None:
        """Decodes the bytes that have been loaded.

        Args:
            name: The layer's name, for the error.
            kernel: What decodes them; None: what suits a layer of this size, where it comes alone.

        Raises:
            CheckpointError: They were cut or changed, or are none.
            ConfigurationError: They are of version 1, and the library that reads it is not installed.
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
            self._list_fars(self.far_positions, self.far_codes)
        self.renew()

    def _list_fars(self, positions: Tensor, codes: Tensor) -> None:
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
        """The codes, int8 [out, in], that the layer or its run-time form holds; None before they are decoded."""
        return self.codes if self.codes is not None or self.form is None else self.form.codes()

    def recode(self) -> None:
        """Makes the bytes again, where they were forgotten: the same that the codes were decoded from."""
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
        """Frees the bytes, where they have been decoded."""
        if self.row_steps is not None:
            self.coded = self.coded.new_empty(0)

    def levels(self, dtype: torch.dtype) -> Tensor:
        """The codes Z [out, in], those beyond a byte included."""
        near = self.near_codes()
        assert near is not None and self.far_positions is not None and self.far_codes is not None
        levels = near.to(dtype)
        if len(self.far_positions):
            levels.view(-1)[self.far_positions] = self.far_codes.to(dtype)
        return levels

    def steps(self) -> tuple[Tensor, Tensor]:
        """Steps of rows and columns, float32."""
        assert self.row_steps is not None and self.column_steps is not None
        return self.row_steps, self.column_steps

    def matrix(self) -> Tensor:
        """The weight `W [out, in]` in the module's dtype, made now; on meta as long as nothing has been decoded."""
        if self.row_steps is None:  # some models look at their weights to initialise them, before `decode` can have run
            return torch.empty(self.matrix_shape, dtype=self.dtype, device="meta")
        row_steps, column_steps = self.steps()
        return self.levels(torch.float32).mul_(column_steps).mul_(row_steps[:, None]).to(self.dtype)

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Computes y = row_steps (Z (column_steps x)) + b."""
        device = input.device.type
        autocast = torch.is_autocast_enabled(device)
        if (torch.get_autocast_dtype(device) if autocast else self.dtype) is torch.float16:
            # Z, and Z (column_steps x), may be beyond its range where y is not.
            return F.linear(input, self.matrix(), bias)
        row_steps, column_steps = self.steps()
        output = F.linear(input * column_steps.to(input.dtype), self.levels(self.dtype))
        output = output * row_steps.to(output.dtype)
        return output if bias is None else output + bias.to(output.dtype)  # autocast

    def embedding(self, indices: Tensor) -> Tensor:
        """Rows of the weight; only these are made."""
        near = self.near_codes()
        assert near is not None
        row_steps, column_steps = self.steps()
        flat = indices.reshape(-1)
        rows = near.index_select(0, flat).float()  # refuses index -1
        if self.far_lists is not None and self.far_columns is not None and self.far_rows is not None:
            lists = self.far_rows.index_select(0, flat)
            columns, codes = self.far_columns.index_select(0, lists), self.far_lists.index_select(0, lists)
            rows.scatter_add_(1, columns, codes)  # the codes are zero there
        rows = rows.mul_(column_steps).mul_(row_steps.index_select(0, flat)[:, None]).to(self.dtype)
        return rows.view(*indices.shape, rows.shape[1])

    def renew(self) -> None:
        """Leaves the codes to a form that holds them; an embedding looks its rows up in its own."""
        super().renew()
        if self.form is not None and self.form.holds_codes and self.kind != "embedding":
            self.codes = None

    def release(self) -> None:
        """Takes back the codes that the form holds."""
        self.codes = self.near_codes()
        super().release()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves as any module does, but a change of dtype leaves the steps alone and only sets `self.dtype`."""
        return super()._apply(
            keeping_dtype(fn, (self.row_steps, self.column_steps, self.far_codes, self.far_lists)), recurse
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Saves the bytes; where they were forgotten, they are made for this once."""
        forgotten = not len(self.coded)
        self.recode()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if forgotten:
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
        """Shape and bits of a weight, for `print(model)`."""
        out_features, in_features = self.matrix_shape
        bits = 8 * self.num_bytes / (out_features * in_features)
        return f"{out_features}x{in_features}, bits={bits:.2f}, bias={self.bias is not None}"


class CodedLinear(WholeLinear, CodedModule):
    """nn.Linear, or transformers' Conv1D, whose weight is [in, out]."""


class CodedConv2d(WholeConv2d, CodedModule):
    """nn.Conv2d, grouped and depthwise too."""


class CodedEmbedding(WholeEmbedding, CodedModule):
    """nn.Embedding; makes only the rows that it looks up."""


CODED: dict[LayerKind, type[CodedModule]] = {
    "linear": CodedLinear,
    "conv1d": CodedLinear,
    "conv2d": CodedConv2d,
    "embedding": CodedEmbedding,
}
