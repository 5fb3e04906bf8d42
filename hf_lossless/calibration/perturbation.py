"""Measures the loss under noise: LLC's f(M), f_input and f_weight.

The noise generators are seeded by layer and batch, so that the noise does not depend on how batches are spread over
processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lossless.calibration.statistics import layer_input, with_layer_input
from hf_lossless.data.batches import Batch, LossFunction, model_device, num_examples, to_device
from hf_lossless.data.processes import failing_together, own_share, sum_over_processes
from hf_lossless.storage.layers import Layer, modules_of


def mean_loss_share(
    model: nn.Module,
    batches: list[Batch],
    loss: LossFunction,
    before_batch: Callable[[int], object] = lambda index: None,
) -> float:
    """Computes this process's part of the mean loss over all examples; one forward pass.

    The parts of all processes sum to the mean loss.

    Under strong noise the loss, and so its part, may be NaN or infinite.

    Args:
        model: In evaluation mode.
        batches: All batches, the same list in every process.
        loss: Mean loss of a batch.
        before_batch: Called with each batch's index before it is run.
    """
    device = model_device(model)
    total_examples = sum(num_examples(batch) for batch in batches)
    total = 0.0
    with torch.no_grad():
        for index, batch in own_share(batches):
            before_batch(index)
            value = loss(model, to_device(batch, device))
            total += value.item() * num_examples(batch) / total_examples
    return total


def mean_loss(model: nn.Module, batches: list[Batch], loss: LossFunction) -> float:
    """Computes the mean loss over all examples, the same in every process; one forward pass."""
    share = torch.tensor([mean_loss_share(model, batches, loss)], dtype=torch.float64)
    return sum_over_processes(share).item()


class LossChange(NamedTuple):
    """A change of the mean loss over all examples, and its standard error.

    The standard error is that of a mean over batches, whose rows differ; it is 0 where there is only one batch.
    """

    mean: float
    standard_error: float


def loss_change(
    model: nn.Module, batches: list[Batch], loss: LossFunction, batch_losses: Sequence[float]
) -> LossChange:
    """Measures the change of the mean loss against the losses in `batch_losses`; one forward pass.

    Args:
        model: In evaluation mode.
        batches: All batches, the same list in every process.
        loss: Mean loss of a batch.
        batch_losses: Loss of each batch before the change of the model.

    Returns:
        The change, the same in every process; NaN or infinity where the loss is not finite.
    """
    device = model_device(model)
    now = torch.zeros(len(batches), dtype=torch.float64)
    with failing_together(), torch.no_grad():
        for index, batch in own_share(batches):
            now[index] = loss(model, to_device(batch, device))
    changes = sum_over_processes(now) - torch.tensor(batch_losses, dtype=torch.float64)
    weights = torch.tensor([num_examples(batch) for batch in batches], dtype=torch.float64)
    weights /= weights.sum()
    mean = weights @ changes
    squares = (weights * (changes - mean)).square().sum() * len(batches) / max(len(batches) - 1, 1)
    return LossChange(mean.item(), squares.sqrt().item())


@contextmanager
def weight_noise(layer: Layer, noise: Tensor) -> Iterator[None]:
    """Adds `noise` [out, in] to a layer's weight inside the context, and restores the weight exactly."""
    weight = layer.weight.data
    before = weight.clone()
    # `matrix` is no view of a channels-last kernel, so the sum is written by way of the weight itself.
    noisy = layer.matrix.detach().float() + noise
    weight.copy_(noisy.T if layer.kind == "conv1d" else noisy.reshape(weight.shape))
    try:
        yield
    finally:
        weight.copy_(before)


@contextmanager
def input_noise(model: nn.Module, layer: Layer, draw: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Adds `draw(input)` to the real-valued inputs of a layer and of the modules tied to it, inside the context."""

    def add(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any] | None:
        values = layer_input(arguments, keywords)
        if not values.is_floating_point():
            return None
        return with_layer_input(values + draw(values), arguments, keywords)

    handles = [module.register_forward_pre_hook(add, with_kwargs=True) for module in modules_of(model, layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def one_sided_noise(shape: torch.Size, sign: float, generator: torch.Generator) -> Tensor:
    """Draws `sign * |random|` with random ~ N(0, 1), on the CPU, so that it is the same for all devices."""
    return sign * torch.randn(shape, generator=generator).abs_()


def seeded_number(*numbers: int) -> int:
    """Combines several numbers into one seed, the same in every process."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**62
    return seed
