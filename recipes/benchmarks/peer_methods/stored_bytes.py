"""Bytes of a model's tensors as they lie at rest: the same count for every peer that gives a torch module.

Quantised weights come as wrappers (torchao, quanto), as torch's own quantised tensors, or as packed parameters; each
is taken apart into codes, scales and zero points. What the wrapper pretends to be does not count.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)


def stored_bytes(model: nn.Module, leave_out: Collection[str] = ()) -> int:
    """Bytes of everything that the model's state dict holds; shared tensors once.

    Args:
        model: Any module, quantised or not.
        leave_out: Entries that a loaded model does not need, by the last part of their names.

    Example:
        >>> stored_bytes(nn.Linear(4, 2))
        40
    """
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    tensors = [
        tensor
        for name, value in model.state_dict().items()
        if name not in unsaved and name.split(".")[-1] not in leave_out
        for tensor in _plain_tensors(value)
        if tensor.numel()
    ]
    # All of them are held until the end: memory that was given back could be counted as shared.
    places = {
        (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape): _bytes(tensor)
        for tensor in tensors
    }
    return sum(places.values())


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that an entry of a state dict is made of."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _plain_tensors(part)
    elif hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value.detach()


def _bytes(tensor: Tensor) -> int:
    if not tensor.is_quantized:
        return tensor.nbytes
    codes = tensor.untyped_storage().nbytes()  # two 4-bit codes lie in one byte
    if tensor.qscheme() in _PER_TENSOR:
        return codes + 8 + 8  # a float64 and an int64
    return codes + tensor.q_per_channel_scales().nbytes + tensor.q_per_channel_zero_points().nbytes
