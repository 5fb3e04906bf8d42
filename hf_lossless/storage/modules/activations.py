"""Quantises the input of a compressed layer to a grid before the layer computes with it.

    scale    float32 [1]     only for a static range
    zero     uint8   [1]     the same

Integer arithmetic on 8-bit or 4-bit inputs is simulated in floating point: the error is that of integer hardware, the
speed is not.
"""

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn

from hf_lossless.storage.activation_grid import DYNAMIC_AXES, dynamic_range, on_activation_grid, scale_and_zero
from hf_lossless.storage.layers import LayerKind
from hf_lossless.storage.plan import ActivationGrid


def keeping_dtype(fn: Callable[[Tensor], Tensor], held: Iterable[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """Makes a function for `nn.Module._apply`: `fn`, but without its cast for the tensors in `held`."""
    held = [tensor for tensor in held if tensor is not None]

    def apply(tensor: Tensor) -> Tensor:
        if any(tensor is one for one in held):  # a cast leaves integers unchanged, so they are passed as bytes
            if not tensor.numel():  # an empty tensor may have a stride that a view as bytes does not allow
                return fn(tensor).to(tensor.dtype)
            return fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return fn(tensor)

    return apply


class QuantisedInput(nn.Module):
    """Puts a tensor on an activation grid.

    Attributes:
        grid: Width and kind of range.
    """

    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, kind: LayerKind, grid: ActivationGrid, device: torch.device) -> None:
        """Makes an empty module for a layer of this kind; `store` fills one with a static range.

        Args:
            kind: Kind of the layer, not an embedding; it determines the axes that share a dynamic range.
            grid: Width and kind of range.
            device: Device of the layer.
        """
        super().__init__()
        self.grid = grid
        self.axes = DYNAMIC_AXES[kind]
        static = grid.range == "static"
        self.register_buffer("scale", torch.empty(1, device=device, dtype=torch.float32) if static else None)
        self.register_buffer("zero", torch.empty(1, device=device, dtype=torch.uint8) if static else None)

    def store(self, scale: Tensor, zero: Tensor) -> None:
        """Stores scale and zero point of a static range."""
        assert self.scale is not None and self.zero is not None
        self.scale.copy_(scale)
        self.zero.copy_(zero)

    def forward(self, input: Tensor) -> Tensor:
        """Rounds the input to the grid; the gradient passes unchanged, because that of rounding is zero."""
        with torch.no_grad():
            if self.scale is not None and self.zero is not None:
                scale, zero = self.scale, self.zero
            else:
                scale, zero = scale_and_zero(*dynamic_range(input, self.axes), self.grid.bits)
            quantised = on_activation_grid(input, scale, zero, self.grid.bits)
        return quantised + (input - input.detach()) if input.requires_grad else quantised

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves as any module does, but keeps the scale's dtype in casts."""
        super()._apply(keeping_dtype(fn, (self.scale,)), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Returns width and range, for `print(model)`."""
        return f"bits={self.grid.bits}, range={self.grid.range}"
