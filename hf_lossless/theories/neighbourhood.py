"""The neighbourhood: how large noise may be before a theory's terms no longer explain the loss (LLC Eq. 5 and 6).

For layer i, noise d = s r in its weight or e = s r in its input, and the mean loss f over the calibration data:

    dL(s)  = f(M under the noise) - f(M)                                       measured
    first  = <df/dw, d>                    or  <df/dh, e>
    second = 1/2 d' H d                    or  1/2 e' H e
    U1 = |dL - first|        U2 = |dL - first - second|                        (LLC Eq. 5 and 6, CET Eq. 7)

LLC prints `dL - first + 1/2 d'Hd + O(.)` between the bars; both terms are subtracted here, as its text says: "the gap
U(x) between theory and practice". Fig. 1 and Table 1 of LLC and Fig. 2 of CET show U.

An order *explains* a noise size when its U is at most `max(RELATIVE_TOLERANCE |dL|, ABSOLUTE_TOLERANCE)`: the change is
known to within half of itself, or it does not matter, since LLC (section 5.1) ignores noise that changes the loss by
less than 1e-4. The neighbourhood of an order ends at the largest size up to which it explains every tried size.

Choices where the papers are silent or differ:

- r ~ N(0, 1) for every number, as the `random` of LLC Algorithm 1, with either sign: noise of one sign, as in its
  rounding, would shift the mean of an activation, and this effect would dominate. One draw for each layer serves every
  size, so that U over s shows the orders and not the draws: U1 rises as s^2, U2 as s^3.
- s is absolute, as in the papers; its effect is larger where numbers are small, so that each layer's rms is reported
  beside it.
- Both terms are exact, over all rows (see `calibration.directional`), for one layer at a time: no cross terms.
- Neither term includes kinks, so that in a network of ReLUs U2 contains their contribution, and is hardly less than U1
  where that dominates. Where inputs are exactly equal, as the blank background of images under a max pool, noise starts
  on a kink: there both U rise as s from the smallest size on.
- U is computed for the mean loss, while LLC writes it for a sample x_i.

In float32 the mean loss itself is known to about 1e-7; U below that is rounding.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lossless.calibration.directional import (
    Direction,
    directional_derivatives,
    input_direction,
    weight_direction,
)
from hf_lossless.calibration.perturbation import mean_loss_share, seeded_number
from hf_lossless.calibration.statistics import InputStatistics, calibrate
from hf_lossless.data.batches import Batch, LossFunction, batch_loss, model_device
from hf_lossless.data.processes import sum_over_processes
from hf_lossless.errors import CalibrationError, ConfigurationError
from hf_lossless.storage.layers import Layer, matches

SIZES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 8e-2, 1e-1)
"""Noise sizes: those of LLC Table 1, and others between them."""

RELATIVE_TOLERANCE = 0.5
"""Largest relative gap at which an order explains a change of the loss..."""

ABSOLUTE_TOLERANCE = 1e-4
"""...and largest absolute gap, in nats: the error_max of LLC section 5.1."""

MAX_LAYERS = 8
"""Number of layers that are measured where none are named."""


@dataclass(frozen=True)
class NoiseGap:
    """Measured and predicted loss change at one noise size; all changes in nats.

    Attributes:
        size: s, the standard deviation of the noise.
        measured: dL; infinity where the loss under the noise is not finite.
        first: The first-order term.
        second: The second-order term.

    Example:
        >>> gap = NoiseGap(size=0.1, measured=0.5, first=0.25, second=0.125)
        >>> gap.first_order_gap, gap.second_order_gap
        (0.25, 0.125)
    """

    size: float
    measured: float
    first: float
    second: float

    @property
    def first_order_gap(self) -> float:
        """Returns U1 = |dL - first|."""
        return abs(self.measured - self.first)

    @property
    def second_order_gap(self) -> float:
        """Returns U2 = |dL - first - second|."""
        return abs(self.measured - self.first - self.second)

    @property
    def tolerance(self) -> float:
        """Returns the U up to which the change counts as explained; 0 where it is infinite."""
        if not math.isfinite(self.measured):
            return 0.0
        return max(RELATIVE_TOLERANCE * abs(self.measured), ABSOLUTE_TOLERANCE)


@dataclass(frozen=True)
class NoiseResponse:
    """The response of the loss to growing noise in one tensor.

    Attributes:
        rms: Root mean square of the tensor's own values, as a reference for absolute noise sizes.
        gaps: Gaps at each noise size, ascending.
    """

    rms: float
    gaps: tuple[NoiseGap, ...]

    @property
    def first_order_until(self) -> float | None:
        """Returns the largest size up to which the first order explains every size; None where it explains none."""
        return self._until(lambda gap: gap.first_order_gap)

    @property
    def second_order_until(self) -> float | None:
        """Returns the largest size up to which both orders together explain every size; None where none."""
        return self._until(lambda gap: gap.second_order_gap)

    def _until(self, gap_of: Callable[[NoiseGap], float]) -> float | None:
        until = None
        for gap in self.gaps:
            if gap_of(gap) > gap.tolerance:
                break
            until = gap.size
        return until


@dataclass(frozen=True)
class LayerNeighbourhood:
    """The noise responses of one layer's weight and input.

    Attributes:
        name: The layer's name.
        weight: Response to noise in its weight (Eq. 5).
        inputs: Response to noise in its input (Eq. 6); None for integer inputs (embeddings) and layers that never ran.
    """

    name: str
    weight: NoiseResponse
    inputs: NoiseResponse | None


@dataclass(frozen=True)
class Neighbourhood:
    """The noise responses of several layers, as `neighbourhood` measures them.

    Attributes:
        layers: The layers' responses, in the order of the model.
        loss: f(M), the mean loss without noise, in nats.
        num_examples: Number of rows in that mean.
        seed: Seed of the noise.
    """

    layers: tuple[LayerNeighbourhood, ...]
    loss: float
    num_examples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Converts to JSON values, with U1, U2 and the ends of the orders; infinity becomes None.

        Returns:
            "loss", "num_examples", "seed", "relative_tolerance", "absolute_tolerance" and "layers": by name, "weight"
            and "inputs" (or None), each with "rms", "first_order_until", "second_order_until" and "gaps".
        """
        return {
            "loss": self.loss,
            "num_examples": self.num_examples,
            "seed": self.seed,
            "relative_tolerance": RELATIVE_TOLERANCE,
            "absolute_tolerance": ABSOLUTE_TOLERANCE,
            "layers": {
                layer.name: {
                    "weight": _response_values(layer.weight),
                    "inputs": None if layer.inputs is None else _response_values(layer.inputs),
                }
                for layer in self.layers
            },
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Neighbourhood":
        """Restores a neighbourhood from the values of `to_dict`.

        Args:
            values: Values from `to_dict`, possibly through a JSON file.
        """
        layers = tuple(
            LayerNeighbourhood(
                name,
                _response_of(layer["weight"]),
                None if layer["inputs"] is None else _response_of(layer["inputs"]),
            )
            for name, layer in values["layers"].items()
        )
        return cls(layers, values["loss"], values["num_examples"], values["seed"])


def neighbourhood(
    model: nn.Module,
    batches: list[Batch],
    layers: Sequence[Layer],
    *,
    loss: LossFunction = batch_loss,
    sizes: Sequence[float] = SIZES,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> Neighbourhood:
    """Measures U of LLC Eq. 5 and 6 for each layer and noise size.

    Args:
        model: The model, in evaluation mode, with weights in float32 or float64; unchanged afterwards.
        batches: All batches, the same list in every process; each process takes its share.
        layers: Layers of the model, for example from `evenly_spaced_layers` or `named_layers`.
        loss: Mean loss of a batch.
        sizes: Noise sizes s, positive.
        seed: Seed of the noise. A layer's noise depends on its name, not on the other layers.
        advance: Called after every layer, for a progress bar.

    Returns:
        The responses, the same in every process. For each layer this costs `2 (len(sizes) + 1)` forward passes over the
        batches, and two times the backward passes of a first and a second derivative, through the layers above; and one
        forward-backward pass and one forward pass for all together.

    Raises:
        ConfigurationError: There are no layers, a size is not positive and finite, or a weight has 16 bits.
        CalibrationError: The loss is not finite, or has no second derivative; the message names the operation.

    Example:
        >>> from hf_lossless.storage.layers import find_layers
        >>> model = nn.Sequential(nn.Linear(4, 3, bias=False)).eval()
        >>> mean = lambda model, batch: model(batch).mean()
        >>> found = neighbourhood(model, [torch.ones(2, 4)], find_layers(model), loss=mean)
        >>> found.layers[0].weight.first_order_until  # the loss is linear: at every size
        0.1
    """
    _check(layers, sizes)
    calibration = calibrate(model, batches, list(layers), loss)
    start = sum_over_processes(torch.tensor(mean_loss_share(model, batches, loss), dtype=torch.float64)).item()
    found = []
    for layer in layers:
        number = zlib.crc32(layer.name.encode())
        inputs = calibration.layers[layer.name].inputs
        directions = [weight_direction(model, layer, seeded_number(seed, number, 0))]
        if inputs is not None:
            directions.append(input_direction(model, layer, seeded_number(seed, number, 1)))
        gaps = [_gaps(model, batches, loss, layer, direction, sorted(sizes), start) for direction in directions]
        found.append(
            LayerNeighbourhood(
                layer.name,
                NoiseResponse(layer.weight.detach().double().square().mean().sqrt().item(), gaps[0]),
                None if inputs is None else NoiseResponse(_rms(inputs), gaps[1]),
            )
        )
        advance()
    return Neighbourhood(tuple(found), start, calibration.num_examples, seed)


def named_layers(layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """Finds the layers that any of the patterns matches (see `layers.matches`), in the order of the model.

    Args:
        layers: Layers of the model.
        patterns: Full names, last parts, parents' names or glob patterns.

    Raises:
        ConfigurationError: A pattern matches no layer.
    """
    chosen = set()
    for pattern in patterns:
        named = {layer.name for layer in layers if any(matches(name, pattern) for name in (layer.name, *layer.tied))}
        if not named:
            some = ", ".join(layer.name for layer in layers[:10])
            raise ConfigurationError(
                f"--layer {pattern!r} names none of the model's {len(layers)} layers ({some}"
                f"{', ...' if len(layers) > 10 else ''}). Give a layer's full name, its last part, a parent's name, or "
                "a glob pattern such as '*.query'."
            )
        chosen |= named
    return [layer for layer in layers if layer.name in chosen]


def evenly_spaced_layers(layers: Sequence[Layer], count: int = MAX_LAYERS) -> list[Layer]:
    """Chooses `count` evenly spaced layers, including the first and the last; all where there are not more.

    Args:
        layers: Layers of the model.
        count: The most layers to choose, at least 2.

    Example:
        >>> evenly_spaced_layers("abcdefghij", 4)
        ['a', 'd', 'g', 'j']
    """
    if len(layers) <= count:
        return list(layers)
    return [layers[round(index * (len(layers) - 1) / (count - 1))] for index in range(count)]


def _gaps(
    model: nn.Module,
    batches: list[Batch],
    loss: LossFunction,
    layer: Layer,
    direction: Direction,
    sizes: list[float],
    start: float,
) -> tuple[NoiseGap, ...]:
    """Measures and predicts the loss change along one direction, at every size."""
    slope, curvature = directional_derivatives(model, batches, loss, direction)
    if not (math.isfinite(slope) and math.isfinite(curvature)):
        raise CalibrationError(
            f"the derivatives of the loss under noise in layer {layer.name!r} are not finite (first {slope}, second "
            f"{curvature}). Name other layers with --layer, or check the rows."
        )
    device, shares = model_device(model), []
    for size in sizes:
        with direction.at(torch.tensor(size, dtype=torch.float64, device=device)):
            shares.append(mean_loss_share(model, batches, loss, direction.before_batch))
    losses = sum_over_processes(torch.tensor(shares, dtype=torch.float64)).tolist()
    return tuple(
        NoiseGap(
            size=size,
            measured=noisy - start if math.isfinite(noisy) else math.inf,
            first=size * slope,
            second=0.5 * size**2 * curvature,
        )
        for size, noisy in zip(sizes, losses, strict=True)
    )


def _check(layers: Sequence[Layer], sizes: Sequence[float]) -> None:
    if not layers:
        raise ConfigurationError("there are no layers to put noise in. Give at least one.")
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise ConfigurationError(f"the noise sizes are {list(sizes)}. Give at least one, each positive and finite.")
    for layer in layers:
        if layer.weight.dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(
                f"layer {layer.name!r} is of {layer.weight.dtype}, whose rounding would drown small noise. "
                "Load the model in float32 (dtype=torch.float32)."
            )


def _rms(inputs: InputStatistics) -> float:
    return math.sqrt(inputs.values.variance + inputs.values.mean**2)


def _response_values(response: NoiseResponse) -> dict[str, Any]:
    return {
        "rms": response.rms,
        "first_order_until": response.first_order_until,
        "second_order_until": response.second_order_until,
        "gaps": [
            {
                "size": gap.size,
                "measured": _finite(gap.measured),
                "first": gap.first,
                "second": gap.second,
                "first_order_gap": _finite(gap.first_order_gap),
                "second_order_gap": _finite(gap.second_order_gap),
            }
            for gap in response.gaps
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _response_of(values: dict[str, Any]) -> NoiseResponse:
    return NoiseResponse(
        values["rms"],
        tuple(
            NoiseGap(gap["size"], math.inf if gap["measured"] is None else gap["measured"], gap["first"], gap["second"])
            for gap in values["gaps"]
        ),
    )
