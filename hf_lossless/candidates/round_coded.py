"""Rounds the layers that are entropy-coded, and computes their bytes and cost."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from hf_lossless.calibration.curvature import second_order_change
from hf_lossless.calibration.statistics import Calibration
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.shaped import stored_steps
from hf_lossless.candidates.two_sided import round_two_sided
from hf_lossless.storage.entropy.matrix import LARGEST_CODE, CodedMatrix, encode
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import CodedGrid
from hf_lossless.storage.values import EncodedMatrix

_LARGEST_BATCH = 2**23
"""Numbers in a batch's weights, or in its metrics: 32 MiB in float32; rounding holds about ten copies."""


@dataclass(frozen=True)
class CodedRounding:
    """The codes of a layer rounded on a shaped grid, and their cost.

    Attributes:
        grid: The grid.
        values: Codes, steps and bytes.
        cost: Cost of the rounding error in the damped metric that shaped the grid, in nats.
    """

    grid: CodedGrid
    values: EncodedMatrix
    cost: float

    @property
    def cost_bytes(self) -> int:
        """Returns the bytes of the coded weight."""
        return len(self.values.stored)


def round_coded(
    layers: list[Layer], grids: Mapping[str, CodedGrid], calibration: Calibration
) -> dict[str, CodedRounding]:
    """Rounds layers by two-sided feedback, layers of one shape together, and codes them.

    Args:
        layers: All layers, with real weights.
        grids: Grids of the layers to round, by layer name.
        calibration: Statistics with curvature, of all calibration rows.
    """
    batches = defaultdict(list)
    for layer in layers:
        if layer.name in grids:
            curvature = calibration.layers[layer.name].curvature
            assert curvature is not None
            key = tuple(layer.matrix.shape), curvature.rows.ndim, curvature.columns.ndim, layer.weight.device
            batches[key].append((layer, grids[layer.name], curvature))
    rounded = {}
    for members in batches.values():
        largest = max(tensor.numel() for tensor in (members[0][0].weight, members[0][2].rows, members[0][2].columns))
        at_once = max(1, _LARGEST_BATCH // largest)
        for start in range(0, len(members), at_once):
            part = members[start : start + at_once]
            roots = [InverseRoots.of(curvature, grid.damping) for _, grid, curvature in part]
            matrices = torch.stack([layer.matrix.detach().float() for layer, _, _ in part])
            row_steps = torch.stack(
                [stored_steps(one.row_steps(grid.step)) for one, (_, grid, _) in zip(roots, part, strict=True)]
            )
            column_steps = torch.stack([stored_steps(one.column_steps) for one in roots])
            codes = round_two_sided(
                matrices, row_steps, column_steps, [one.rows for one in roots], [one.columns for one in roots]
            )
            codes.clamp_(-LARGEST_CODE, LARGEST_CODE)
            errors = codes * row_steps[:, :, None] * column_steps[:, None] - matrices
            for member, (layer, grid, curvature) in enumerate(part):
                coded = CodedMatrix.of(
                    codes[member].to(torch.int32).cpu().numpy(),
                    row_steps[member].cpu().numpy(),
                    column_steps[member].cpu().numpy(),
                )
                rows, columns = curvature.damped(grid.damping.rows).rows, curvature.damped(grid.damping.columns).columns
                cost = second_order_change(errors[member], replace(curvature, rows=rows, columns=columns))
                rounded[layer.name] = CodedRounding(grid, EncodedMatrix(coded, encode(coded)), cost)
    return rounded
