"""What a compressed layer has to do with its run-time form: it makes one, keeps it true, and gives it up again.

A form is made of the layer's tensors and may hold some of them in the layer's place. Whatever changes these tensors
(a move, a cast, a load) is preceded by `release` and followed by a new form.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_lossless.storage.runtime.form import Form, compiled_product
from hf_lossless.storage.runtime.runtimes import Runtime

FormMaker = Callable[[Any], Form | None]
"""Makes the form of a layer, or None: the layer's own floating-point path."""


class Running(nn.Module):
    """Base of the compressed layers: the form that they are computed in.

    Attributes:
        form: How the layer is computed; None: in floating point, of its stored tensors.
        runtime: What was asked for.
    """

    form: Form | None = None
    runtime: Runtime = "exact"
    _make_form: FormMaker | None = None

    def run_in(self, make_form: FormMaker, runtime: Runtime) -> None:
        """Gives the layer a form, now and whenever its tensors have changed.

        Args:
            make_form: What makes it.
            runtime: What was asked for.
        """
        self.release()
        self._make_form, self.runtime = make_form, runtime
        self.renew()

    def release(self) -> None:
        """Gives up the form; the layer has all its tensors again."""
        self.form = None

    def renew(self) -> None:
        """Makes the form anew."""
        if self._make_form is not None:
            self.form = self._make_form(self)

    def in_form(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """Y = x W' + b in the layer's form; None where it has none, or none for such an input."""
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
