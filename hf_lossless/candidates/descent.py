"""LoD's truncation: the smallest rank within a tolerance, with an error that does not point up the gradient.

LoD A.2.1: "At each candidate rank c, a perturbation delta^c is constructed within the corresponding subspace, with
element-wise magnitude bounded by |delta_ij| <= tau [...] then aligned with the negative gradient direction, ensuring
that the first-order effect on the loss is non-increasing. The search terminates as soon as a candidate rank meets the
tolerance condition." The paper gives no formula for the alignment; this is ours. With `W = U S V'` and g = dl/dW,

    delta^c = -U_> S_> V_>'  -  eta U_c (U_c' g V_c) V_c',      eta = max(0, -<g, U_> S_> V_>'>) / ||U_c' g V_c||_F^2

where `>` marks the dropped components. The second term lies in the subspace of the first c singular vectors, so that
W + delta^c keeps rank c, and eta is the shortest step that makes `<g, delta^c>` zero where the truncation alone would
raise the loss. No longer step down the gradient is taken: in trials, moving weights by Newton or gradient steps wrecked
a trained model.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hf_lossless.calibration.units import in_unit, unit_of
from hf_lossless.candidates.low_rank import Factorisation, Factors

TOLERANCE = 1e-2
"""tau: the largest change of a single weight, in the weight's own unit (LoD A.2.1)."""


def aligned_factors(factorisation: Factorisation, rank: int, matrix: Tensor, gradient: Tensor) -> Factors:
    """Truncates a factorisation to `rank` such that its first-order effect is not positive.

    Args:
        factorisation: The plain SVD of the matrix.
        rank: c.
        matrix: W [out, in].
        gradient: dl/dW [out, in].

    Returns:
        Factors with `<g, L R - W> <= 0` up to rounding; the plain truncation where it satisfies this, or where the
        gradient is orthogonal to the subspace.
    """
    factors, matrix = factorisation.truncated(rank), matrix.detach()
    gradient = in_unit(gradient, unit_of(gradient))  # only its direction matters
    first_order = _inner(gradient, factors.left @ factors.right - matrix)
    if first_order <= 0:
        return factors
    U, Vt = functional.normalize(factors.left, dim=0), functional.normalize(factors.right, dim=1)
    inside = U.T @ gradient @ Vt.T  # U_c' g V_c
    square = inside.square().sum()
    if square == 0:
        return factors
    singular_values = factorisation.singular_values[:rank].float()
    return Factors(U, (singular_values.diag() - first_order / square * inside) @ Vt)


def largest_errors(factorisation: Factorisation, matrix: Tensor, largest: int) -> Tensor:
    """Computes `max |delta_ij|` of the plain truncations to rank 1, 2, ... `largest`; [largest].

    Args:
        factorisation: The plain SVD of the matrix.
        matrix: W [out, in].
        largest: The last rank.
    """
    left, right = factorisation.factors.left, factorisation.factors.right
    remainder = matrix.detach().float().clone()
    errors = []
    for index in range(min(largest, left.shape[1])):
        remainder.addr_(left[:, index], right[index], alpha=-1)  # one more rank
        errors.append(torch.stack(remainder.aminmax()).abs().max())
    return torch.stack(errors)


def smallest_rank(
    factorisation: Factorisation, matrix: Tensor, gradient: Tensor, largest: int, tolerance: float = TOLERANCE
) -> int | None:
    """Searches the smallest rank whose error stays within `|delta_ij| <= tau` (LoD A.2.1).

    Args:
        factorisation: The plain SVD of the matrix.
        matrix: W [out, in].
        gradient: dl/dW [out, in].
        largest: The last rank to try.
        tolerance: tau. Both the truncation's error and the aligned one must be within it.

    Returns:
        The rank; None where none up to `largest` is within the tolerance.
    """
    matrix = matrix.detach()
    within = largest_errors(factorisation, matrix, largest) <= tolerance
    for rank in (within.nonzero().flatten() + 1).tolist():
        factors = aligned_factors(factorisation, rank, matrix, gradient)
        if (factors.left @ factors.right - matrix).abs().max() <= tolerance:
            return int(rank)
    return None


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() * second.double()).sum()
