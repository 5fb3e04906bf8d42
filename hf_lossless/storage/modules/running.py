"""The run-time form of a compressed layer: how it is made, kept up to date and released.

A form is made from the layer's tensors and may hold some of them in the layer's place. Every change of these tensors (a
move, a cast, a load) is preceded by `release` and followed by a new form.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_lossless.storage.runtime.form import Form, compiled_product
from hf_lossless.storage.runtime.runtimes import Runtime

FormMaker = Callable[[Any], Form | None]
"""A function that makes the form of a layer, or None for the layer's own floating-point path."""


class Running(nn.Module):
    """Base of the compressed layers: the run-time form in which they are computed.

    Attributes:
        form: The run-time form; None: computed in floating point from the stored tensors.
        runtime: The run time that was requested.
    """

    form: Form | None = None
    runtime: Runtime = "exact"
    _make_form: FormMaker | None = None

    def run_in(self, make_form: FormMaker, runtime: Runtime) -> None:
        """Sets a layer's run-time form, now and again whenever its tensors have changed.

        Args:
            make_form: Makes the form.
            runtime: The run time that was requested.
        """
        self.release()
        self._make_form, self.runtime = make_form, runtime
        self.renew()

    def release(self) -> None:
        """Drops the form; the layer holds all of its tensors again."""
        self.form = None

    def renew(self) -> None:
        """Makes the form again from the present tensors."""
        if self._make_form is not None:
            self.form = self._make_form(self)

    def in_form(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """Computes y = x W' + b in the layer's form; None where it has no form for this input."""
        form = self.form
        if form is None or not form.takes(input):
            return None
        if torch.compiler.is_compiling() and not form.traced:
            output: Tensor = compiled_product(input, form.number)
        else:
            output = form.product(input)
        return output if bias is None else output + bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.release()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.renew()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)
        self.renew()
