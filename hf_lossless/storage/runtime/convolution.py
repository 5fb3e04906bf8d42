"""Convolutions: with a kernel made once, or in 8-bit whole numbers with a range for each image.

    a = max |x| of an image           y = a conv(q(x / a), Z) row_steps

Z are codes up to 64 in size, as for linear layers (`int8_linear`), made of the kernel anew: steps of columns lie within
the window, where no input can take them. The kernel is oneDNN's.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lossless.storage.runtime.form import Form
from hf_lossless.storage.runtime.int8_linear import LARGEST_SAFE

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Window:
    """How a kernel moves over an image."""

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int


class DenseConv2d(Form):
    """A convolution with its kernel in float32."""

    traced = True

    def __init__(self, kernel: Tensor, window: Window) -> None:
        """Takes a kernel [out, in / groups, kh, kw]."""
        super().__init__(len(kernel))
        self.kernel, self.window = kernel, window

    def product(self, input: Tensor) -> Tensor:
        """Computes the convolution, without bias."""
        window = self.window
        return F.conv2d(input, self.kernel, None, window.stride, window.padding, window.dilation, window.groups)

    @property
    def nbytes(self) -> int:
        """Four bytes a weight."""
        return self.kernel.nbytes


class Int8Conv2d(Form):
    """A convolution in whole numbers; of numbers as padding, not by name."""

    def __init__(self, kernel: Tensor, window: Window) -> None:
        """Rounds and packs a kernel [out, in / groups, kh, kw]."""
        super().__init__(len(kernel))
        steps = kernel.abs().amax((1, 2, 3)).div_(LARGEST_SAFE - 1).clamp_min_(_TINY)
        self.codes_of_kernel = (kernel / steps[:, None, None, None]).round_().to(torch.int8)
        self.row_steps, self.window = steps, window
        self.zeros = torch.zeros(len(steps), dtype=torch.int32)
        self._pack()

    def _pack(self) -> None:
        window = self.window
        self.arguments: Any = (list(window.stride), list(window.padding), list(window.dilation), window.groups)
        self.packed = torch.ops.onednn.qconv_prepack(
            self.codes_of_kernel, self.row_steps, 1.0, 0, *self.arguments, None
        )

    def product(self, input: Tensor) -> Tensor:
        """Computes the convolution, without bias; in floating point for images with a number that is not finite."""
        largest = input.abs().amax((-3, -2, -1), keepdim=True) if input.numel() else input.new_ones(1)
        if input.dim() == 3 or not input.numel() or not math.isfinite(largest.sum().item()):
            window, kernel = self.window, self.codes_of_kernel.float() * self.row_steps[:, None, None, None]
            return F.conv2d(input, kernel, None, window.stride, window.padding, window.dilation, window.groups)
        largest.clamp_min_(_TINY)
        scaled = (input / largest).contiguous(memory_format=torch.channels_last)
        low = min(scaled.amin().item(), 0.0)
        step = (1.0 - low) / 255
        zero = round(-low / step)
        codes = (scaled / step).round_().add_(zero).clamp_(0, 255).to(torch.uint8)
        output: Tensor = torch.ops.onednn.qconv2d_pointwise(
            *(codes, step, zero, self.packed, self.row_steps, self.zeros, None),
            *(*self.arguments, 1.0, 0, torch.float32, "none", [], ""),
        )
        return output.mul_(largest)

    def output_shape(self, shape: torch.Size) -> list[int]:
        """Computes the output's shape, [images, out, height, width]."""
        kernel = self.codes_of_kernel.shape[2:]
        strides, paddings, dilations, _ = self.arguments
        sides = [
            (side + 2 * padding - dilation * (size - 1) - 1) // stride + 1
            for side, padding, dilation, size, stride in zip(
                shape[-2:], paddings, dilations, kernel, strides, strict=True
            )
        ]
        return [*shape[:-3], self.out_features, *sides]

    @property
    def nbytes(self) -> int:
        """Two bytes a weight: packed, and as they were."""
        return 2 * self.codes_of_kernel.nbytes + self.row_steps.nbytes

    def __getstate__(self) -> dict[str, Any]:
        """Without what no other process could read."""
        return {name: value for name, value in self.__dict__.items() if name != "packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Packs the codes again."""
        super().__setstate__(state)
        self._pack()
