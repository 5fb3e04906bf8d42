"""`Form`: how a compressed layer is computed, where that is not the layer's own floating-point path.

A form takes inputs in float32 on a CPU that want no gradient. All else (half precision, autocast, a GPU, adapters in
training) goes the layer's own way, so that a form may be there always.
"""

import itertools
import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

_numbers = itertools.count()
_FORMS: "weakref.WeakValueDictionary[int, Form]" = weakref.WeakValueDictionary()


class Form(ABC):
    """Computes y = W x for one layer; the bias is added to it.

    Attributes:
        number: Of this form in this process: what a compiled graph, which cannot hold packed weights, knows it by.
        out_features: Rows of W.
        traced: Whether a compiler may look into the product.
        holds_codes: Whether the layer's codes can be had from it.
    """

    holds_codes: bool = False
    traced: bool = False

    def __init__(self, out_features: int) -> None:
        self.out_features = out_features
        self._enter()

    def _enter(self) -> None:
        self.number = next(_numbers)
        _FORMS[self.number] = self

    @abstractmethod
    def product(self, input: Tensor) -> Tensor:
        """Computes W x, float32, without bias.

        Args:
            input: x, float32 on the CPU, of any strides, empty too; numbers that are not finite come out as such.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in memory."""

    def codes(self) -> Tensor | None:
        """Returns the layer's codes, int8 [out, in], where the form holds them; else None."""
        return None

    def output_shape(self, shape: torch.Size) -> list[int]:
        """Computes the shape of the product of an input."""
        return [*shape[:-1], self.out_features]

    def takes(self, input: Tensor) -> bool:
        """Returns whether the form can compute with an input."""
        return (
            input.dtype is torch.float32
            and input.device.type == "cpu"
            and not (input.requires_grad and torch.is_grad_enabled())
            and not torch.is_autocast_enabled("cpu")
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, in this process or another, is a form of its own."""
        self.__dict__.update(state)
        self._enter()


def form_numbered(number: int) -> Form:
    """Finds the form of that number, as long as its layer lives."""
    form = _FORMS.get(number)
    assert form is not None, "a compiled graph outlived the model that it was made of"
    return form


@torch.library.custom_op("hf_lossless::product", mutates_args=())
def compiled_product(input: Tensor, number: int) -> Tensor:
    """Computes the product of a form, by its number, for compiled and exported graphs.

    A graph that was exported can run in this process only, for it does not hold the weights.
    """
    return form_numbered(number).product(input)


@compiled_product.register_fake
def _(input: Tensor, number: int) -> Tensor:
    return input.new_empty(form_numbered(number).output_shape(input.shape))
