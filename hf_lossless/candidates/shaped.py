"""Grids shaped by the curvature: every weight's rounding costs the same, and codes are stored at their entropy.

Row k and column i have the step `c V_kk U_ii / sqrt(scale)`, with the roots V and U of the damped metric (see `sides`).
Rounded by feedback from both sides, every weight adds `c^2 / 24` nats to the predicted loss: reverse water-filling,
where directions that the data never excites get steps so large that their codes are all zero, and take no bytes. One
number c makes one candidate; a ladder of them, the same for all layers, is what the knapsack chooses from.

Rounding a whole layer at each c would take as long as a hundred calibration passes. What a candidate takes and costs is
found on some of its rows instead, where each weight is moved by normal noise of the variance that feedback will bring
it, and rounded by itself:

    t = w + carried noise,    e = round(t / step) - t / step,    E = c e / sqrt(scale)

The bytes are those that the codes take with the coder's own models. They are corrected once the chosen plan is rounded
in full (see `planning`).
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
"""Rows of a layer on which candidates are tried."""

_RESOLUTIONS = 2.0**6, 2.0**-3
"""Root mean square of the weights over the geometric mean of the steps, at the first and the last of the ladder."""

_SMALLEST = 1e-30
"""Stands for the size of a matrix of zeros."""

_ORDINARY = 80
"""Binary orders of magnitude of sqrt(scale) between which c = 1 has steps in float32."""

_BYTES_PER_FAR_CODE = 8

_ROUNDS = 8
"""Of noise that brings errors that bring noise, at most."""

_SETTLED = 0.02
"""A round that makes squared errors grow by less is the last."""


def ladder(matrix: Tensor, sides: InverseRoots) -> list[float]:
    """The numbers c for a layer, from the finest up: powers of `sqrt(2)`, common to all layers.

    At high rate each takes half a bit a weight less than the one before.

    Args:
        matrix: W [out, in].
        sides: Its metric.
    """
    first, last = (math.ceil(2 * math.log2(step_at(resolution, matrix, sides))) for resolution in _RESOLUTIONS)
    return [2.0 ** (half_octaves / 2) for half_octaves in range(first, last)]


def step_at(resolution: float, matrix: Tensor, sides: InverseRoots) -> float:
    """The c at which the weights' root mean square is so many times the geometric mean of the steps."""
    size = matrix.detach().float().square().mean().sqrt().item()
    start = unit_of_size(math.sqrt(sides.scale), _ORDINARY)  # the steps of c = 1 may be no numbers of float32
    mean = (sides.row_steps(start).log().mean() + sides.column_steps.log().mean()).exp().item()
    return max(size, _SMALLEST) * start / mean / resolution


def stored_steps(steps: Tensor) -> Tensor:
    """Steps as they will be stored, see `storage.entropy.steps`."""
    return torch.from_numpy(decode_steps(*encode_steps(steps.float().cpu().numpy()))).to(steps.device)


@dataclass(frozen=True)
class Sample:
    """Some rows of a layer, each standing for `share` of them: every so many-th, by falling curvature.

    Attributes:
        rows: Their numbers, [sampled].
        weights: [sampled, in], float32.
        noise: Standard normal numbers, the same for every c, [sampled, in].
        share: Rows of the layer over sampled rows.
        stand_ins: For each row of the layer the place in the sample of the one that stands for it, [out].
    """

    rows: Tensor
    weights: Tensor
    noise: Tensor
    share: float
    stand_ins: Tensor

    @classmethod
    def of(cls, matrix: Tensor, sides: InverseRoots, generator: torch.Generator) -> "Sample":
        """The sample of a layer's matrix [out, in]."""
        num_rows = len(matrix)
        size = min(num_rows, SAMPLED_ROWS)
        places = ((torch.arange(size) + 0.5) * (num_rows / size)).long().to(matrix.device)
        rows = sides.rows.unit_steps.argsort()[places]
        weights = matrix.detach().index_select(0, rows).float()
        noise = torch.randn(weights.shape, generator=generator).to(weights)
        order = sides.rows.unit_steps.argsort()
        stand_ins = torch.empty_like(order).index_copy_(0, order, (torch.arange(num_rows).to(order) * size) // num_rows)
        return cls(rows, weights, noise, num_rows / size, stand_ins)


@dataclass(frozen=True)
class Trial:
    """What some rows become at one c.

    Attributes:
        codes: Whole numbers, float32 [sampled, in].
        errors: e, [sampled, in]: between -1/2 and 1/2 of a step.
    """

    codes: Tensor
    errors: Tensor

    def cost(self, step: float, share: float) -> float:
        """What a layer costs in its damped metric, in nats: `1/2 ||E||^2 = c^2 / 2 sum_ki e_ki^2`.

        Args:
            step: c.
            share: Rows of the layer over sampled rows.
        """
        return 0.5 * step**2 * share * self.errors.square().sum(dtype=torch.float64).item()


def try_step(step: float, sample: Sample, sides: InverseRoots) -> Trial:
    """Rounds a sample of rows as feedback would.

    Args:
        step: c.
        sample: The rows.
        sides: What the codes are fitted to.
    """
    row_steps = stored_steps(sides.row_steps(step))[sample.rows, None]
    steps = row_steps * stored_steps(sides.column_steps)
    # The variance of the normalised errors in units of c^2 / scale, by column: 1/12 but where codes are mostly zero.
    # Without feedback first, then once more with the feedback that this makes.
    trial = _rounded(sample.weights / steps)
    own = sides.rows.unit_steps[sample.rows, None] * sides.columns.unit_steps  # V_kk U_ii
    for _ in range(_ROUNDS):
        before = trial.errors
        squares = trial.errors.square()
        mean = squares.mean().clamp(min=torch.finfo(torch.float32).tiny)  # zero where the weights are on their levels
        shares, row_shares = squares.mean(0), (squares.mean(1) / mean).index_select(0, sample.stand_ins)
        row_variance = sides.rows.carried(row_shares) + sides.rows.unit_steps.square() * row_shares
        column_variance = sides.columns.carried(shares) + sides.columns.unit_steps.square() * shares
        both = row_variance[sample.rows, None] * column_variance
        carried = (both - own.square() * row_shares[sample.rows, None] * shares).clamp(min=0)
        trial = _rounded((sample.weights / steps).addcmul(sample.noise, carried.sqrt() / own))
        if trial.errors.square().sum() < (1 + _SETTLED) * before.square().sum():
            break
    return trial


def _rounded(positions: Tensor) -> Trial:
    codes = positions.round()
    return Trial(codes, codes - positions)


def coded_bytes(step: float, trial: Trial, sample: Sample, sides: InverseRoots) -> int:
    """Bytes that a layer takes whose rows become what a sample became."""
    codes = trial.codes.clamp(-(2.0**31), 2.0**31 - 256).to(torch.int32).cpu().numpy()
    ones = [np.ones(size, np.float32) for size in codes.shape]
    coded = CodedMatrix.of(codes, *ones)
    _, num_bytes = best_levels(coded.codes, sample.share)
    steps = sum(
        entropy_bytes(np.bincount(encode_steps(side.float().cpu().numpy())[0]))
        for side in (sides.row_steps(step), sides.column_steps)
    )
    far = round(len(coded.far_codes) * sample.share) * _BYTES_PER_FAR_CODE
    return OVERHEAD_BYTES + num_bytes + steps + far


@dataclass(frozen=True)
class Judge:
    """What unit errors cost by some factors, beside a scale.

    Attributes:
        rows: `(V R_j V')_kk` of the sampled rows, float64 [sampled].
        columns: `(U C_j U')_ii`, float64 [in].
        scale: `scale_j / scale` times the rows that each sampled row stands for.
    """

    rows: Tensor
    columns: Tensor
    scale: float

    @classmethod
    def of(cls, judge: KroneckerFactors, sample: Sample, sides: InverseRoots) -> "Judge":
        """The judge that factors R_j and C_j make of errors in the roots of `sides`."""
        rows = sides.rows.charges(judge.rows)[sample.rows].double()
        return cls(rows, sides.columns.charges(judge.columns).double(), judge.scale / sides.scale * sample.share)

    def cost(self, step: float, trial: Trial) -> float:
        """What a layer is expected to cost whose rows become what a sample became, in nats.

        1/2 scale_j c^2 / scale sum_ki (V R_j V')_kk (U C_j U')_ii e_ki^2
        """
        squares = (self.rows @ trial.errors.square().double() @ self.columns).item()
        return 0.5 * self.scale * step**2 * squares
