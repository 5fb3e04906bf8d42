"""CET's own allocation of widths: steps 2 to 6 of its Algorithm 1 (arXiv 2502.15802, section 3.3 and 3.4).

Notation as in `cet`: layer l has n_l weights, m eigenpairs (lambda_k, v_k) of its block of the Hessian, the error d.

    lambda_k y_k^2 = 0, k = 1..m,  y = P' d,  subject to a size of the model and the least ||d||^2    (Eq. 12, 13)
    b = log2(1 / (|d| + alpha)), or the width whose real quantisation error is |d|                    (step 5)

For comparison with the paper, as printed; `cet.predict` and the knapsack are what `compress` uses. Where the text
contradicts itself, or says too little:

* Step 4 takes "the m smallest eigenvalues": the sharp ones are constrained, see `cet`.
* Step 4 prints the gradient of ||d||^2 alone. Section 3.3 and Eq. 13 ask for both, and for the size of the model.
* Eq. 13 asks for M_compress < M_origin only, which any width below 32 meets. Here the size is a target.
* |d_i| of a layer is one number, the root mean square of its error.
* Which mapping is taken "when the first method fails due to outliers" is not said; see `width_of`.

What follows from the formulas: a layer has far more weights than the m directions that are closed to d, so that y = 0
costs nothing, and the least ||d||^2 is then the same |d| in every layer where no eigenvalue is negative. The
eigenvalues have no say; layers differ by their real quantisation errors alone. (The ViT of 38 layers, |d| = 1/16 asked:
|d| is 0.062 to 0.063 in 37 of them.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_lossless.candidates.grids import Candidate
from hf_lossless.errors import UnreachableTargetError
from hf_lossless.storage.plan import KEPT_BITS
from hf_lossless.theories.cet import LayerSpectrum

ALPHA = 1e-8
"""Keeps the logarithm of step 5 finite."""

WidthMapping = Literal["formula", "matching"]


@dataclass(frozen=True)
class Allocation:
    """What Algorithm 1 decides for one layer.

    Attributes:
        bits: The width.
        mapping: Which of the two mappings gave it.
        error: |d|, root mean square of the error that was solved for.
        formula_bits: log2(1 / (|d| + alpha)), before it is put on a width that exists.
        sharp_share: Share of ||d||^2 in the sharp directions.
    """

    bits: int
    mapping: WidthMapping
    error: float
    formula_bits: float
    sharp_share: float


def width_by_formula(error: float, alpha: float = ALPHA) -> float:
    """`b = log2(1 / (|d| + alpha))` (Algorithm 1, step 5), not yet a whole number.

    Example:
        >>> round(width_by_formula(0.125), 4)
        3.0
    """
    return -math.log2(error + alpha)


def width_by_matching(error: float, real_errors: Mapping[int, float]) -> int:
    """The width whose real quantisation error is nearest to |d|, as a ratio (section 3.4, second method).

    Args:
        error: |d|.
        real_errors: Root mean square error of each width; a width without error is never near.

    Example:
        >>> width_by_matching(0.02, {2: 0.1, 4: 0.03, 8: 0.001})
        4
    """
    inexact = {bits: real for bits, real in real_errors.items() if real > 0}
    if not inexact:
        return min(real_errors)
    return min(inexact, key=lambda bits: (abs(math.log(inexact[bits] / error)), bits))


def width_of(error: float, real_errors: Mapping[int, float], alpha: float = ALPHA) -> tuple[int, WidthMapping]:
    """The width of a layer, and by which mapping.

    The formula takes the weights to fill the range 0 to 1. It "fails to yield accurate results due to the impact of
    outliers" (section 3.4) where the real error of the width that it names is not within a factor of two of |d|, which
    is one bit. Then the real errors decide.

    Example:
        >>> width_of(0.06, {2: 0.25, 4: 0.0625, 8: 0.004})
        (4, 'formula')
        >>> width_of(0.06, {2: 0.06, 4: 0.015, 8: 0.001})
        (2, 'matching')
    """
    exact = width_by_formula(error, alpha)
    bits = min(real_errors, key=lambda width: (abs(width - exact), width))
    if error / 2 <= real_errors[bits] <= 2 * error:
        return bits, "formula"
    return width_by_matching(error, real_errors), "matching"


def solve_errors(
    spectra: Mapping[str, LayerSpectrum],
    target_bits: float,
    *,
    norm_weight: float | None = None,
    num_starts: int = 4,
    num_steps: int = 2000,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> dict[str, tuple[Tensor, float]]:
    """Steps 2 to 4 of Algorithm 1: the d of Eq. 13, with Adam.

        minimise    sum_l [ sum_k lambda_lk y_lk^2 + norm_weight ||d_l||^2 ]
        subject to  sum_l n_l log2(1 / |d_l|) <= target_bits sum_l n_l,     |d_l| = ||d_l|| / sqrt(n_l)

    lambda relative to the largest |lambda| of all layers. Only the m coordinates y of d, and the length r of what is
    left of it, occur: Adam runs on these m + 1 numbers of a layer instead of n, with the same minimum. The constraint
    is met exactly: d = c z, where c(z) is the scale at which the size is the target, and Adam moves z.

    The starts are random, and the mean of their solutions is taken ("integration of multiple sampling results").

    Args:
        spectra: By layer name.
        target_bits: Mean width of a weight, the size constraint.
        norm_weight: Weight of ||d||^2; None: 1, and twice the depth of the most negative eigenvalue where that is more.
        num_starts: Random starts.
        num_steps: Adam's steps (the paper: about 2000).
        learning_rate: Adam's, of coordinates that start near 1; it falls to zero along a cosine.
        seed: Of the starts.

    Returns:
        For each layer y [m], a root mean square over the starts as its sign is arbitrary, and r.
    """
    names = list(spectra)
    weights = torch.tensor([spectra[name].num_weights for name in names], dtype=torch.float64)
    width = max([len(spectra[name].values) for name in names], default=0)
    curvatures = torch.zeros(len(names), width + 1, dtype=torch.float64)  # the last column is the rest, with 0
    exists = torch.zeros_like(curvatures)
    for row, name in enumerate(names):
        values = spectra[name].values
        curvatures[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        exists[row, : len(values)] = 1
        exists[row, -1] = float(spectra[name].num_weights > len(values))
    largest = curvatures.abs().max().item() or 1.0
    curvatures /= largest
    if norm_weight is None:
        norm_weight = max(1.0, -2.0 * curvatures.min().item())
    curvatures += norm_weight

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(num_starts, *curvatures.shape, generator=generator, dtype=torch.float64)
    # The length of n - m normal numbers, nearly constant, relative to one of them
    start[..., -1] = (weights - exists[:, :-1].sum(1)).clamp(min=1).sqrt()
    unit = start.square().mul(exists).sum(-1, keepdim=True).div(weights[:, None]).sqrt()
    moved = torch.nn.Parameter(torch.ones_like(start))  # each coordinate relative to where it started

    def scaled() -> Tensor:
        """d, [starts, layers, m + 1], at the scale that meets the size."""
        coordinates = moved * start / unit * exists
        mean_square = coordinates.square().sum(-1) / weights
        bits = -0.5 * (weights * mean_square.log2()).sum(-1) / weights.sum()
        return coordinates * torch.exp2(bits - target_bits)[:, None, None]

    optimiser = torch.optim.Adam([moved], lr=learning_rate, eps=1e-20)  # small layers have small gradients
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    scale = 4.0**target_bits / weights.sum()
    with torch.enable_grad():
        for _ in range(num_steps):
            optimiser.zero_grad()
            objective = (curvatures * scaled().square()).sum((-1, -2)) * scale
            objective.sum().backward()
            optimiser.step()
            schedule.step()
    solution = scaled().detach().square().mean(0).sqrt()
    return {
        name: (solution[row, : len(spectra[name].values)].clone(), solution[row, -1].item())
        for row, name in enumerate(names)
    }


def allocate(
    spectra: Mapping[str, LayerSpectrum],
    candidates: Mapping[str, list[Candidate]],
    mean_bits: float,
    *,
    alpha: float = ALPHA,
    seed: int = 0,
) -> dict[str, Allocation]:
    """Algorithm 1 as printed: the width of every layer, for a size of the model.

    Adam meets the size by the formula's widths, which are not those taken in the end. All errors together are scaled
    until the widths taken fit: the minimum for another size is the same d times a number, so that Adam runs once.

    Args:
        spectra: Of `cet.examine`.
        candidates: By layer name; those with a grid alone count, and keeping the layer as 16 bits without error.
        mean_bits: The most that the widths taken may be in the mean over all weights.
        alpha: Of the formula.
        seed: Of the starts.

    Returns:
        Allocations by layer name, for the layers of `spectra`: those with the most bits within the size.

    Raises:
        UnreachableTargetError: The smallest widths are above the size.
    """
    reference_bits = 4.0
    solutions = solve_errors(spectra, reference_bits, seed=seed)
    real = {name: real_errors(candidates[name]) for name in spectra}
    best: dict[str, Allocation] = {}
    for step in range(32 * (KEPT_BITS + 8) + 1):
        found = {
            name: _allocation(solution, 2 ** (reference_bits - step / 32), spectra[name], real[name], alpha)
            for name, solution in solutions.items()
        }
        if _mean(found, spectra) <= mean_bits and (not best or _mean(found, spectra) > _mean(best, spectra)):
            best = found
    if not best and spectra:
        raise UnreachableTargetError(
            f"mean_bits={mean_bits}: no widths of CET's are that small in the mean. Raise mean_bits or add narrower "
            "candidates."
        )
    return best


def _allocation(
    solution: tuple[Tensor, float],
    factor: float,
    spectrum: LayerSpectrum,
    real: Mapping[int, float],
    alpha: float,
) -> Allocation:
    """The width of one layer for d times a factor."""
    sharp, rest = solution
    inside = sharp.square().sum().item()
    squared = inside + rest**2
    error = factor * math.sqrt(squared / spectrum.num_weights)
    bits, mapping = width_of(error, real, alpha)
    return Allocation(bits, mapping, error, width_by_formula(error, alpha), inside / squared)


def _mean(allocations: Mapping[str, Allocation], spectra: Mapping[str, LayerSpectrum]) -> float:
    weights = sum(spectrum.num_weights for spectrum in spectra.values())
    return sum(one.bits * spectra[name].num_weights for name, one in allocations.items()) / weights if weights else 0.0


def real_errors(candidates: list[Candidate]) -> dict[int, float]:
    """Root mean square error of each width among the candidates, |d| as it really is."""
    errors = {}
    for candidate in candidates:
        if candidate.kind == "kept":
            errors[KEPT_BITS] = 0.0
        elif candidate.grid is not None and candidate.low_rank is None:
            errors[candidate.grid.bits] = min(candidate.noise, errors.get(candidate.grid.bits, math.inf))
    return errors
