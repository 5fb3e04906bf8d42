"""Layers whose weight is made once, in floating point: what is quickest where a layer is small, and exact."""

from torch import Tensor
from torch.nn import functional as F

from hf_lossless.storage.runtime.form import Form


class DenseLinear(Form):
    """y = W x with W in float32."""

    traced = True

    def __init__(self, weight: Tensor) -> None:
        """Takes W [out, in]."""
        super().__init__(len(weight))
        self.weight = weight

    def product(self, input: Tensor) -> Tensor:
        """Computes W x."""
        return F.linear(input, self.weight)

    @property
    def nbytes(self) -> int:
        """Four bytes a weight."""
        return self.weight.nbytes
