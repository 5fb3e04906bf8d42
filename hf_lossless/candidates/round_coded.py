"""Codes of the layers that are to be entropy-coded, their bytes, and what they cost."""

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
"""Numbers in the weights of a batch, or in its metrics: 32 MiB in float32, of which rounding holds about ten copies."""


@dataclass(frozen=True)
class CodedRounding:
    """A layer rounded on a shaped grid.

    Attributes:
        grid: The grid.
        values: Codes, steps and bytes.
        cost: What it costs in the damped metric that shaped it, in nats.
    """

    grid: CodedGrid
    values: EncodedMatrix
    cost: float

    @property
    def cost_bytes(self) -> int:
        """Bytes that it is stored in."""
        return len(self.values.stored)


def round_coded(
    layers: list[Layer], grids: Mapping[str, CodedGrid], calibration: Calibration
) -> dict[str, CodedRounding]:
    """Rounds layers by feedback from both sides, those of one shape together, and codes them.

    Args:
        layers: All layers, with real weights.
        grids: The grids of those that are meant, by layer name.
        calibration: With curvature; all its rows have their part.
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
            sides = [InverseRoots.of(curvature, grid.damping) for _, grid, curvature in part]
            matrices = torch.stack([layer.matrix.detach().float() for layer, _, _ in part])
            row_steps = torch.stack(
                [stored_steps(one.row_steps(grid.step)) for one, (_, grid, _) in zip(sides, part, strict=True)]
            )
            column_steps = torch.stack([stored_steps(one.column_steps) for one in sides])
            codes = round_two_sided(
                matrices, row_steps, column_steps, [one.rows for one in sides], [one.columns for one in sides]
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
