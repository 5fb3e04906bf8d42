"""LLC's lossless decomposition ("Compression for Better", Algorithm 2, Eq. 10).

For a layer with weight W, a candidate W + d of low rank, the mean gradient dl/dw and the mean loss f:

    minimise   f(w + d) - f(w) ~ <dl/dw, d>                                              (10)
    subject to || W - L R ||_F <= gamma, element by element                              (10a)
               0 < rank < N M / (N + M)                                                  (10b, see `candidates.ranks`)

Algorithm 2 tries the ranks from the smallest up, keeps those inside the neighbourhood (line 9) whose error points down
the gradient (line 10), records their loss (line 11), and stops early (lines 12-14).

How gaps of the paper are filled here:

- gamma. Eq. 10a bounds a norm "for all i, j", so that its scale is that of single weights: the root mean square
  `||d||_F / sqrt(NM)` is compared. Section 3 gives 8e-3 as the noise of weights up to which first-order terms lead,
  and LLC uses first-order terms only.
- Early stopping. The algorithm stops where the error goes to zero, the text where "a candidate decomposition meets the
  loss threshold with a sufficiently low loss". We stop at a measured change below `error_max` of Algorithm 1 (1e-4),
  which holds where the error goes to zero as well. Factors may be stored in several widths; each width has a search of
  its own.
- The loss (line 11) is measured on the calibration data. The predictions of widths are sums of absolute values (see
  `llc`), so that a rank would win by noise alone if its measured change kept its sign; so the absolute value is taken
  here too. The sign is used in line 10.
- Line 10 uses the error of the rank alone, before the factors are rounded to a grid, since rounding has a first-order
  change of random sign. An error that consists of arithmetic rounding only passes for the same reason.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from hf_lossless.candidates.grids import Candidate
from hf_lossless.storage.layers import Layer
from hf_lossless.theories.noise_limits import ERROR_MAX, FIRST_ORDER, rms
from hf_lossless.theories.problem import Prediction, Problem, measured_change

GAMMA = FIRST_ORDER
"""Radius of the neighbourhood as a root mean square (LLC section 3, Fig. 1)."""

LOSS_THRESHOLD = ERROR_MAX
"""Change of the loss at which the search stops."""

_ROUNDINGS = 8.0
"""Rounding error of a float32 product of factors, in relative precisions of float32, at most; a weight in half
precision has an error of one of its own relative precision."""


def within_neighbourhood(error: Tensor, gamma: float = GAMMA) -> bool:
    """Tests Eq. 10a: `||d||_F / sqrt(NM) <= gamma`.

    Args:
        error: d [out, in].
        gamma: Largest root mean square.

    Example:
        >>> within_neighbourhood(torch.full((2, 2), 0.004)), within_neighbourhood(torch.full((2, 2), 0.02))
        (True, False)
    """
    return rms(error) <= gamma


def points_down(error: Tensor, gradient: Tensor, matrix: Tensor) -> bool:
    """Tests line 10 of Algorithm 2: `<dl/dw, d> < 0`, or an error of arithmetic rounding only.

    Args:
        error: d [out, in] of the rank.
        gradient: dl/dw [out, in].
        matrix: W [out, in].
    """
    first_order = (error.double() * gradient.double()).sum().item()
    precision = max(torch.finfo(matrix.dtype).eps, _ROUNDINGS * torch.finfo(torch.float32).eps)
    return first_order < 0 or rms(error) <= precision * rms(matrix)


def predict_layer(
    problem: Problem, layer: Layer, candidates: list[Candidate], gamma: float = GAMMA
) -> list[Prediction]:
    """Runs Algorithm 2 for one layer.

    Args:
        problem: The problem, with gradients in its statistics.
        layer: The layer.
        candidates: The candidates with factors, smallest rank first.
        gamma: Radius of the neighbourhood.

    Returns:
        For each candidate the absolute measured change of the loss; infinity for candidates outside the neighbourhood,
        those whose error points up the gradient, and those of a higher rank than the one at which the search stopped.
        Each measured candidate costs one forward pass.
    """
    gradient = problem.calibration.layers[layer.name].gradient
    assert gradient is not None
    predictions = []
    finished = set()
    for candidate in candidates:
        change = math.inf
        search = (candidate.grid, _widths(candidate))
        if search not in finished:
            error = candidate.error(layer.matrix)
            if within_neighbourhood(error, gamma) and points_down(_of_rank(candidate, layer), gradient, layer.matrix):
                change = abs(measured_change(problem, layer, error))
                if change <= LOSS_THRESHOLD:
                    finished.add(search)
        predictions.append(Prediction(change))
        problem.advance()
    return predictions


def _widths(candidate: Candidate) -> tuple[int | None, ...]:
    """Returns the widths of L and R."""
    assert candidate.low_rank is not None
    return tuple(None if grid is None else grid.bits for grid in (candidate.low_rank.left, candidate.low_rank.right))


def _of_rank(candidate: Candidate, layer: Layer) -> Tensor:
    """Computes the error before the factors are rounded to their grids."""
    assert candidate.low_rank is not None
    exact = candidate.low_rank.model_copy(update={"left": None, "right": None})
    return replace(candidate, low_rank=exact).error(layer.matrix)
