"""Cholesky factors of damped second moments, with this package's error where the factorisation fails."""

import torch
from torch import Tensor

from hf_lossless.errors import CalibrationError


def cholesky(metric: Tensor) -> Tensor:
    """Computes the lower triangular Cholesky factor C with `C C' = M`.

    Args:
        metric: M, symmetric, [n, n].

    Raises:
        CalibrationError: M is not positive definite. Float32 sums err by at most a tenth of the least damping, as seen
            with 4,096 nearly constant inputs.
    """
    root: Tensor
    root, status = torch.linalg.cholesky_ex(metric)
    if status.item():
        raise CalibrationError(
            f"the second moments of a layer, damped, are a matrix [{len(metric)}, {len(metric)}] that is not positive "
            "definite. Check the scale of the calibration rows and of the weights, or name the layer in "
            "modules_to_not_convert."
        )
    return root
