"""A model stored on shaped grids with one number c for all layers, at a ratio that is asked for.

One c puts the same expected loss on every weight of the model, which is what reverse water-filling asks. There is no
knapsack and no fixed width in it, so that two variants differ by what is varied only.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peer_methods.problem import Batch, PeerProblem, logits_of
from peers import figures, scores
from torch import Tensor

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.calibration.perturbation import weight_noise
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.round_coded import CodedRounding, round_coded
from hf_lossless.candidates.shaped import step_at
from hf_lossless.data.batches import LossFunction, batch_loss
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.plan import CodedGrid, Damping

_CLOSE = 0.005
"""Share of the bytes by which a trial may miss its ratio."""

_ATTEMPTS = 6

DampingOf = Callable[[Layer], Damping]


@dataclass
class Bench:
    """A model, its held-out rows, and what the original makes of them.

    Attributes:
        known: What the first variant took at each c that it was tried at, for others to begin with.
    """

    problem: PeerProblem
    test_batches: list[Batch]
    layers: list[Layer] = field(init=False)
    labels: Tensor = field(init=False)
    original: Tensor = field(init=False)
    known: dict[float, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = find_layers(self.problem.model)
        self.labels = torch.cat([batch["labels"] for batch in self.test_batches])
        self.original = scores(logits_of(self.problem.model), self.test_batches)

    @property
    def other_bytes(self) -> int:
        """Bytes of the tensors that are no layer's weight."""
        return self.problem.original_bytes - sum(layer.weight.nbytes for layer in self.layers)

    def calibrated(self, batches: list[Batch] | None = None, loss: LossFunction = batch_loss) -> Calibration:
        """The curvature of all layers."""
        batches = self.problem.batches if batches is None else batches
        return calibrate(self.problem.model, batches, self.layers, loss, curvature=True)

    def scores_of(self, coded: dict[str, CodedRounding]) -> Tensor:
        """What the model answers with its layers as coded."""
        with ExitStack() as stack:
            for layer in self.layers:
                error = coded[layer.name].values.dense - layer.matrix.detach().float()
                stack.enter_context(weight_noise(layer, error))
            return scores(logits_of(self.problem.model), self.test_batches)

    def judged(self, logits: Tensor) -> dict[str, Any]:
        """Loss, metric, flips and divergence."""
        return figures(self.original, logits, self.labels, self.problem.task)


@dataclass
class Variant:
    """One way to shape, round and code: its size is a falling function of c."""

    bench: Bench
    calibration: Calibration
    damping: DampingOf
    _sizes: dict[float, int] = field(default_factory=dict)
    _is_first: bool = field(init=False)

    def __post_init__(self) -> None:
        self._is_first = not self.bench.known

    def coded(self, step: float) -> dict[str, CodedRounding]:
        """All layers at one c."""
        grids = {
            layer.name: CodedGrid(step=step, damping=self.damping(layer), shape=tuple(layer.matrix.shape))
            for layer in self.bench.layers
        }
        coded = round_coded(self.bench.layers, grids, self.calibration)
        self._sizes[step] = self.bench.other_bytes + sum(one.cost_bytes for one in coded.values())
        return coded

    def at_ratio(self, ratio: float) -> tuple[float, dict[str, CodedRounding]]:
        """The c whose tensors take the original's bytes over `ratio`, to within `_CLOSE`, and the layers."""
        wanted = self.bench.problem.original_bytes / ratio
        for _ in range(_ATTEMPTS):
            step = self._guess(wanted)
            coded = self.coded(step)
            if abs(self._sizes[step] / wanted - 1) < _CLOSE:
                break
        self.bench.known.update({step: size for step, size in self._sizes.items() if self._is_first})
        return step, coded

    def row(self, ratio: float) -> dict[str, Any]:
        """What the variant comes to at a ratio, on the held-out rows."""
        step, coded = self.at_ratio(ratio)
        size = self._sizes[step]
        cost = sum(one.cost for one in coded.values())
        judged = self.bench.judged(self.bench.scores_of(coded))
        return {"ratio": self.bench.problem.original_bytes / size, "step": step, "in_sample_cost": cost, **judged}

    def _first_guess(self) -> float:
        """The c at which the largest layer has steps as large as its weights."""
        layer = max(self.bench.layers, key=lambda layer: layer.weight.numel())
        curvature = self.calibration.layers[layer.name].curvature
        assert curvature is not None
        return step_at(2.0, layer.matrix, InverseRoots.of(curvature, self.damping(layer)))

    def _guess(self, wanted: float) -> float:
        """By the line through the two known sizes next to the one wanted, of log c on the bytes."""
        if not self._sizes and not self.bench.known:
            return self._first_guess()
        known = sorted((self._sizes or self.bench.known).items(), key=lambda item: abs(item[1] - wanted))[:2]
        step, size = known[0]
        weights = sum(layer.weight.numel() for layer in self.bench.layers)
        slope = -8 * math.log(2) / weights * 0.85  # a bit a weight halves c
        if len(known) > 1 and known[1][1] != size:
            slope = min((math.log(known[1][0]) - math.log(step)) / (known[1][1] - size), slope / 4)
        return step * math.exp(slope * (wanted - size))


def with_factors(calibration: Calibration, change: Callable[[KroneckerFactors], KroneckerFactors]) -> Calibration:
    """The calibration with its curvature changed layer by layer."""
    layers = {
        name: replace(one, curvature=None if one.curvature is None else change(one.curvature))
        for name, one in calibration.layers.items()
    }
    return replace(calibration, layers=layers)
