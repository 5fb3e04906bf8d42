"""Grids shaped by the curvature: every weight's rounding costs the same, and codes are stored at their entropy.

Row k and column i have the step `c V_kk U_ii / sqrt(scale)`, with the roots V and U of the damped metric (see
`inverse_roots`). Rounded by two-sided feedback, every weight adds `c^2 / 24` nats to the predicted loss: reverse
water-filling, where directions that the data do not span get steps so large that their codes are all zero, and take no
bytes. Each number c gives one candidate; the knapsack chooses from a ladder of them, the same for all layers.

Rounding a full layer at each c would take as long as a hundred calibration passes. A candidate's bytes and cost are
estimated on a sample of its rows instead: each weight is shifted by normal noise with the variance of the feedback, and
rounded by itself:

    t = w + feedback noise,    e = round(t / step) - t / step,    E = c e / sqrt(scale)

The bytes are those of the codes under the coder's own models. They are corrected once the chosen plan is rounded in
full (see `planning`).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.calibration.units import unit_of_size
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.storage.entropy.frequencies import entropy_bytes
from hf_lossless.storage.entropy.levels import best_levels
from hf_lossless.storage.entropy.matrix import OVERHEAD_BYTES, CodedMatrix
from hf_lossless.storage.entropy.steps import decode_steps, encode_steps

SAMPLED_ROWS = 128
"""Rows of a layer on which candidates are estimated."""

_RESOLUTIONS = 2.0**6, 2.0**-3
"""Root mean square of the weights over the geometric mean of the steps, at the first and the last of the ladder."""

_SMALLEST = 1e-30
"""Size that is assumed for a matrix of zeros."""

_ORDINARY = 80
"""Binary orders of magnitude of sqrt(scale) for which c = 1 has steps in float32."""

_BYTES_PER_FAR_CODE = 8

_ROUNDS = 8
"""Most rounds of estimating the feedback noise from the errors it causes."""

_LEAST_GROWTH = 0.02
"""The rounds end when the squared errors grow by less than this share."""


def ladder(matrix: Tensor, roots: InverseRoots) -> list[float]:
    """Computes the numbers c for a layer, finest first: powers of `sqrt(2)`, common to all layers.

    At high rate each step takes half a bit per weight less than the one before.

    Args:
        matrix: W [out, in].
        roots: Inverse roots of its metric.
    """
    first, last = (math.ceil(2 * math.log2(step_at(resolution, matrix, roots))) for resolution in _RESOLUTIONS)
    return [2.0 ** (half_octaves / 2) for half_octaves in range(first, last)]


def step_at(resolution: float, matrix: Tensor, roots: InverseRoots) -> float:
    """Computes the c at which the weights' root mean square is `resolution` times the geometric mean of the steps.

    Args:
        resolution: Root mean square of the weights over the geometric mean of the steps.
        matrix: W [out, in].
        roots: Inverse roots of its metric.
    """
    size = matrix.detach().float().square().mean().sqrt().item()
    start = unit_of_size(math.sqrt(roots.scale), _ORDINARY)  # the steps of c = 1 may not fit float32
    mean = (roots.row_steps(start).log().mean() + roots.column_steps.log().mean()).exp().item()
    return max(size, _SMALLEST) * start / mean / resolution


def stored_steps(steps: Tensor) -> Tensor:
    """Rounds steps to their stored form, see `storage.entropy.steps`."""
    return torch.from_numpy(decode_steps(*encode_steps(steps.float().cpu().numpy()))).to(steps.device)


@dataclass(frozen=True)
class Sample:
    """A sample of a layer's rows, evenly spaced by curvature, each representing `share` rows.

    Attributes:
        rows: Indices of the sampled rows, [sampled].
        weights: Weights of the sampled rows, [sampled, in], float32.
        noise: Standard normal numbers, the same for every c, [sampled, in].
        share: Rows of the layer over sampled rows.
        stand_ins: For each row of the layer the position in the sample of the row that represents it, [out].
    """

    rows: Tensor
    weights: Tensor
    noise: Tensor
    share: float
    stand_ins: Tensor

    @classmethod
    def of(cls, matrix: Tensor, roots: InverseRoots, generator: torch.Generator) -> "Sample":
        """Draws the sample of a layer's matrix [out, in].

        Args:
            matrix: W [out, in].
            roots: Inverse roots of its metric.
            generator: Generator of the noise, on the CPU.
        """
        num_rows = len(matrix)
        size = min(num_rows, SAMPLED_ROWS)
        places = ((torch.arange(size) + 0.5) * (num_rows / size)).long().to(matrix.device)
        rows = roots.rows.unit_steps.argsort()[places]
        weights = matrix.detach().index_select(0, rows).float()
        noise = torch.randn(weights.shape, generator=generator).to(weights)
        order = roots.rows.unit_steps.argsort()
        stand_ins = torch.empty_like(order).index_copy_(0, order, (torch.arange(num_rows).to(order) * size) // num_rows)
        return cls(rows, weights, noise, num_rows / size, stand_ins)


@dataclass(frozen=True)
class Trial:
    """The codes and errors of a sample of rows at one c.

    Attributes:
        codes: Codes, whole numbers in float32 [sampled, in].
        errors: e, [sampled, in], between -1/2 and 1/2 of a step.
    """

    codes: Tensor
    errors: Tensor

    def cost(self, step: float, share: float) -> float:
        """Computes the layer's cost in its damped metric, in nats: `1/2 ||E||^2 = c^2 / 2 sum_ki e_ki^2`.

        Args:
            step: c.
            share: Rows of the layer over sampled rows.
        """
        return 0.5 * step**2 * share * self.errors.square().sum(dtype=torch.float64).item()


def try_step(step: float, sample: Sample, roots: InverseRoots) -> Trial:
    """Rounds a sample of rows, with noise in place of feedback.

    Args:
        step: c.
        sample: The rows.
        roots: Inverse roots of the metric that codes are fitted to.
    """
    row_steps = stored_steps(roots.row_steps(step))[sample.rows, None]
    steps = row_steps * stored_steps(roots.column_steps)
    # The variance of the normalised errors is in units of c^2 / scale, by column: 1/12 unless most codes are zero.
    # It is estimated without feedback first, then again with the feedback noise that results.
    trial = _rounded(sample.weights / steps)
    own = roots.rows.unit_steps[sample.rows, None] * roots.columns.unit_steps  # V_kk U_ii
    for _ in range(_ROUNDS):
        before = trial.errors
        squares = trial.errors.square()
        mean = squares.mean().clamp(min=torch.finfo(torch.float32).tiny)  # zero where all weights lie on levels
        shares, row_shares = squares.mean(0), (squares.mean(1) / mean).index_select(0, sample.stand_ins)
        row_variance = roots.rows.feedback_variance(row_shares) + roots.rows.unit_steps.square() * row_shares
        column_variance = roots.columns.feedback_variance(shares) + roots.columns.unit_steps.square() * shares
        both = row_variance[sample.rows, None] * column_variance
        feedback = (both - own.square() * row_shares[sample.rows, None] * shares).clamp(min=0)
        trial = _rounded((sample.weights / steps).addcmul(sample.noise, feedback.sqrt() / own))
        if trial.errors.square().sum() < (1 + _LEAST_GROWTH) * before.square().sum():
            break
    return trial


def _rounded(positions: Tensor) -> Trial:
    codes = positions.round()
    return Trial(codes, codes - positions)


def coded_bytes(step: float, trial: Trial, sample: Sample, roots: InverseRoots) -> int:
    """Estimates the bytes of a layer from the trial of its sampled rows.

    Args:
        step: c.
        trial: Codes of the sampled rows at c.
        sample: The rows.
        roots: Inverse roots of the layer's metric.
    """
    codes = trial.codes.clamp(-(2.0**31), 2.0**31 - 256).to(torch.int32).cpu().numpy()
    ones = [np.ones(size, np.float32) for size in codes.shape]
    coded = CodedMatrix.of(codes, *ones)
    _, num_bytes = best_levels(coded.codes, sample.share)
    steps = sum(
        entropy_bytes(np.bincount(encode_steps(one.float().cpu().numpy())[0]))
        for one in (roots.row_steps(step), roots.column_steps)
    )
    far = round(len(coded.far_codes) * sample.share) * _BYTES_PER_FAR_CODE
    return OVERHEAD_BYTES + num_bytes + steps + far


@dataclass(frozen=True)
class Judge:
    """The cost of unit errors under other factors than those that the grid was fitted to.

    Attributes:
        rows: `(V R_j V')_kk` of the sampled rows, float64 [sampled].
        columns: `(U C_j U')_ii` of all columns, float64 [in].
        scale: `scale_j / scale` times the rows that each sampled row represents.
    """

    rows: Tensor
    columns: Tensor
    scale: float

    @classmethod
    def of(cls, judge: KroneckerFactors, sample: Sample, roots: InverseRoots) -> "Judge":
        """Computes the costs of unit errors, normalised by the inverse roots, under the factors R_j and C_j.

        Args:
            judge: Factors R_j and C_j, with their scale.
            sample: The sampled rows.
            roots: Inverse roots of the metric that the grid is fitted to.
        """
        rows = roots.rows.charges(judge.rows)[sample.rows].double()
        return cls(rows, roots.columns.charges(judge.columns).double(), judge.scale / roots.scale * sample.share)

    def cost(self, step: float, trial: Trial) -> float:
        """Estimates the cost of a layer, in nats, from the trial of its sampled rows.

        The cost is `1/2 scale_j c^2 / scale sum_ki (V R_j V')_kk (U C_j U')_ii e_ki^2`.

        Args:
            step: c.
            trial: Errors of the sampled rows at c.
        """
        squares = (self.rows @ trial.errors.square().double() @ self.columns).item()
        return 0.5 * self.scale * step**2 * squares
