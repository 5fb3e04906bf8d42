"""Scales keep their dtype when a model is cast: they are read in float32 whatever the model computes in."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def keeping_dtype(fn: Callable[[Tensor], Tensor], held: Iterable[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` is to do: `fn`, but without its cast for the tensors in `held`."""
    held = [tensor for tensor in held if tensor is not None]

    def apply(tensor: Tensor) -> Tensor:
        if any(tensor is one for one in held):  # a cast leaves whole numbers alone, so they pass as bytes
            if not tensor.numel():  # an empty one may have a stride that bytes cannot have
                return fn(tensor).to(tensor.dtype)
            return fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return fn(tensor)

    return apply
