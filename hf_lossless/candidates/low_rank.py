"""Factorisations `W [out, in] ~ L [out, r] @ R [r, in]`: the truncated SVD, in the metric that the loss sees."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A matrix as a product.

    Attributes:
        left: L [out, rank], float32.
        right: R [rank, in], float32.
    """

    left: Tensor
    right: Tensor
