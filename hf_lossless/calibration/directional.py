"""The first two derivatives of the loss along one random direction of a weight or of an input.

Notation: r is random ~ N(0, 1), of the shape of a layer's weight w or of its input h; t is a number; f the mean loss.

    F(t) = f(w + t r)   or   f(h + t r)
    F'(0) = <df/dw, r>  or   <df/dh, r>           the first-order term of noise d = s r is  s F'(0)
    F''(0) = r' H r                               its second-order term is  1/2 s^2 F''(0)

Both are exact, over all rows, from differentiating twice by the scalar t: only the part of the model above the layer is
differentiated, and one batch's graph at a time is in memory. `hessian` computes whole vectors `H v` instead, as
eigenvectors and traces need, for weights only and with the graphs of all its batches in memory.

Neither sees kinks: a ReLU or a max pool is flat on both sides of its kink, so that F'' of a convolutional network
misses the curvature that its kinks add up to over a step.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_lossless.calibration.hessian import (
    naming_what_has_no_derivative,
    only_these_require_gradients,
    refuse_once_differentiable,
)
from hf_lossless.calibration.perturbation import input_noise, seeded_number
from hf_lossless.data.batches import Batch, LossFunction, model_device, num_examples, to_device
from hf_lossless.data.processes import failing_together, own_share, sum_over_processes
from hf_lossless.storage.layers import Layer, modules_of


@dataclass(frozen=True)
class Direction:
    """Noise r along which the model is perturbed.

    Attributes:
        at: Opens a context in which the model is perturbed by t r; t is a scalar tensor that may require a gradient.
        before_batch: To be called with each batch's index before the batch is run.
    """

    at: Callable[[Tensor], AbstractContextManager[None]]
    before_batch: Callable[[int], object] = lambda index: None


def weight_direction(model: nn.Module, layer: Layer, seed: int) -> Direction:
    """Draws noise r ~ N(0, 1) for a layer's weight, as a matrix [out, in] on the CPU."""
    matrix = torch.randn(layer.matrix.shape, generator=torch.Generator().manual_seed(seed))
    weight = layer.weight
    noise = (matrix.T if layer.kind == "conv1d" else matrix).reshape(weight.shape).to(weight)
    users = modules_of(model, layer)

    @contextmanager
    def at(position: Tensor) -> Iterator[None]:
        moved = weight.detach() + position * noise
        for module in users:  # the parameter itself is never written to
            module._parameters["weight"] = moved  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in users:
                module._parameters["weight"] = weight

    return Direction(at)


def input_direction(model: nn.Module, layer: Layer, seed: int) -> Direction:
    """Draws noise r ~ N(0, 1) for a layer's real-valued input, on the CPU, anew for each batch."""
    generator = torch.Generator()

    def at(position: Tensor) -> AbstractContextManager[None]:
        def draw(values: Tensor) -> Tensor:
            return position * torch.randn(values.shape, generator=generator).to(values)

        return input_noise(model, layer, draw)

    return Direction(at, lambda index: generator.manual_seed(seeded_number(seed, index)))


def directional_derivatives(
    model: nn.Module, batches: list[Batch], loss: LossFunction, direction: Direction
) -> tuple[float, float]:
    """Computes F'(0) and F''(0) of the mean loss over all examples; zeros where the loss does not depend on r.

    Costs one forward pass and two backward passes through the layers above the noise. Weights, gradients and flags are
    restored afterwards.

    Args:
        model: In evaluation mode.
        batches: All batches, the same list in every process; each process takes its share.
        loss: Mean loss of a batch.
        direction: The noise r.

    Returns:
        F'(0) in nats per unit of noise, F''(0) in nats per squared unit, the same in every process.

    Raises:
        CalibrationError: An operation has no second derivative; the message names it.

    Example:
        >>> from hf_lossless.storage.layers import find_layers
        >>> model = nn.Sequential(nn.Linear(3, 1, bias=False))
        >>> square = lambda model, batch: model(batch).square().mean()
        >>> direction = weight_direction(model, find_layers(model)[0], seed=0)
        >>> slope, curvature = directional_derivatives(model, [torch.eye(3)], square, direction)
        >>> r = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
        >>> abs(curvature - 2 / 3 * r.square().sum().item()) < 1e-5
        True
    """
    device = model_device(model)
    total_examples = sum(map(num_examples, batches))
    totals = torch.zeros(2, dtype=torch.float64)
    with torch.enable_grad(), only_these_require_gradients(model, []), sdpa_kernel(SDPBackend.MATH):
        with failing_together(), naming_what_has_no_derivative():
            for index, batch in own_share(batches):
                position = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
                direction.before_batch(index)
                with direction.at(position):
                    value = loss(model, to_device(batch, device))
                totals += _derivatives(value, position) * num_examples(batch) / total_examples
    slope, curvature = sum_over_processes(totals).tolist()
    return slope, curvature


def _derivatives(value: Tensor, position: Tensor) -> Tensor:
    """Computes the first and the second derivative of one batch's loss, float64 on the CPU."""
    if not value.requires_grad:  # the loss does not depend on the noise
        return torch.zeros(2, dtype=torch.float64)
    refuse_once_differentiable(value)
    (slope,) = torch.autograd.grad(value, position, create_graph=True)
    curvature = torch.zeros_like(slope)
    if slope.requires_grad:  # else the loss is linear
        (curvature,) = torch.autograd.grad(slope, position, allow_unused=True, materialize_grads=True)
    return torch.stack([slope.detach(), curvature]).double().cpu()
