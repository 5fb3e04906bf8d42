"""One forward-backward pass over the calibration data, and the statistics it gathers for each layer.

Notation (LLC Eq. 3): `p` is the gradient of the mean loss, with respect to a layer's input h (activations) or to its
weight w. The moments are over the elements of the vector, as LLC Eq. 7 has them: E[p] = (1/k) p . 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_lossless.calibration.activations import ActivationStatistics, ActivationSums
from hf_lossless.calibration.curvature import HalvedCurvature, KroneckerFactors
from hf_lossless.data.batches import Batch, LossFunction, model_device, num_examples, to_device
from hf_lossless.data.processes import (
    failing_together,
    max_over_processes,
    own_share,
    sum_over_processes,
)
from hf_lossless.errors import CalibrationError
from hf_lossless.storage.activation_grid import may_quantise_input
from hf_lossless.storage.layers import Layer, as_matrix, modules_of


@dataclass(frozen=True)
class Moments:
    """Mean and variance over the elements of a vector, and their number."""

    mean: float
    variance: float
    count: int

    @property
    def is_zero(self) -> bool:
        """Tells whether all elements are zero."""
        return self.mean == 0 and self.variance == 0


@dataclass(frozen=True)
class InputStatistics:
    """The distribution of a layer's input values and of the loss's gradient with respect to them.

    Attributes:
        values: Moments of the inputs.
        mean_deviation: E|x - E x|, the scale b of a Laplace density; E x is taken batch by batch.
        minimum: Least input.
        maximum: Largest input.
        gradient: Moments of dl/dh through this layer alone, where other layers use the same h.
    """

    values: Moments
    mean_deviation: float
    minimum: float
    maximum: float
    gradient: Moments


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer.

    Attributes:
        calls: Number of calls with non-empty input; 0 means that the loss does not depend on the layer's own forward.
        inputs: Statistics of the layer's input; None for integer inputs (embeddings).
        weight_gradient: Moments of dl/dw of the mean loss.
        gradient: dl/dw itself as a matrix [out, in], float32; None unless asked for.
        curvature: Factors of the second derivatives of the mean loss; None unless asked for.
        halves: The same factors of the even and of the odd batches alone, to fit to one half and judge on the other;
            None unless asked for, and where there is only one batch.
        activations: Statistics to predict the loss change of rounding the input; None unless asked for, for integer
            inputs and for tied layers.
    """

    calls: int
    inputs: InputStatistics | None
    weight_gradient: Moments
    gradient: Tensor | None = field(default=None, compare=False, repr=False)
    curvature: KroneckerFactors | None = field(default=None, compare=False, repr=False)
    halves: tuple[KroneckerFactors, KroneckerFactors] | None = field(default=None, compare=False, repr=False)
    activations: ActivationStatistics | None = field(default=None, compare=False, repr=False)

    @property
    def has_derivatives(self) -> bool:
        """Tells whether the layer ran and has a non-zero gradient and curvature (in float16 these may underflow)."""
        vanished = self.curvature is not None and self.curvature.scale == 0
        return bool(self.calls) and not self.weight_gradient.is_zero and not vanished

    @property
    def underflows(self) -> bool:
        """Tells whether the weight's derivatives underflow, though the loss depends on the layer's input.

        Derivatives by the weight are products of inputs and gradients, and may be too small for a floating dtype.
        """
        inputs = self.inputs
        reached = inputs is not None and not inputs.values.is_zero and not inputs.gradient.is_zero
        return reached and not self.has_derivatives


@dataclass(frozen=True)
class Calibration:
    """The statistics of all layers, and the loss, of one calibration pass.

    Attributes:
        layers: Statistics of each layer, by name.
        loss: Mean loss over all examples, the f(M) of LLC Algorithm 1.
        num_examples: Examples seen, over all processes.
        batch_losses: Mean loss of each batch.
    """

    layers: dict[str, LayerStatistics]
    loss: float
    num_examples: int
    batch_losses: tuple[float, ...] = ()

    def without_tensors(self) -> "Calibration":
        """Returns the statistics without tensors: a few numbers for each layer, to be kept with the model."""
        layers = {
            name: replace(layer, gradient=None, curvature=None, halves=None, activations=None)
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)


@dataclass
class _Sums:
    """Running sums of one layer, as one vector that is summed over processes, and the extremes."""

    totals: Tensor = field(default_factory=lambda: torch.zeros(7, dtype=torch.float64))
    extremes: Tensor = field(default_factory=lambda: torch.full((2,), -math.inf, dtype=torch.float64))  # -min, max

    def add_call(self) -> None:
        self.totals[0] += 1

    def add_inputs(self, values: Tensor) -> None:
        values = values.detach().double()  # in float32 the variance of inputs far from zero would cancel away
        if not values.numel():
            return
        total = values.sum()
        deviation = (values - total / values.numel()).abs().sum()
        count = torch.full_like(total, values.numel())
        self.totals[1:5] += torch.stack([count, total, values.square().sum(), deviation]).cpu()
        self.extremes = torch.maximum(self.extremes, torch.stack([-values.amin(), values.amax()]).cpu())

    def add_gradient(self, gradient: Tensor) -> None:
        gradient = gradient.detach().double()
        self.totals[5:7] += torch.stack([gradient.sum(), gradient.square().sum()]).cpu()

    def statistics(self, weight_gradient: Tensor) -> LayerStatistics:
        calls, count, total, square, deviation, gradient_total, gradient_square = self.totals.tolist()
        inputs = None
        if count:
            inputs = InputStatistics(
                values=_moments(total, square, count),
                mean_deviation=deviation / count,
                minimum=-self.extremes[0].item(),
                maximum=self.extremes[1].item(),
                gradient=_moments(gradient_total, gradient_square, count),
            )
        weight_gradient = weight_gradient.double()
        total, square = weight_gradient.sum().item(), weight_gradient.square().sum().item()
        return LayerStatistics(int(calls), inputs, _moments(total, square, weight_gradient.numel()))


def calibrate(
    model: nn.Module,
    batches: list[Batch],
    layers: list[Layer],
    loss: LossFunction,
    advance: Callable[[], object] = lambda: None,
    *,
    gradients: bool = False,
    curvature: bool = False,
    activation_bits: Sequence[int] = (),
    halves: Sequence[int] | None = None,
) -> Calibration:
    """Gathers the layers' statistics in one forward-backward pass.

    Args:
        model: In evaluation mode.
        batches: All batches, the same list in every process; each process takes its share.
        layers: The layers to watch.
        loss: Mean loss of a batch.
        advance: Called after every batch, for a progress bar.
        gradients: Whether to keep the gradient of every layer's weight.
        curvature: Whether to gather the Kronecker factors of every layer's curvature. On one CPU core the pass then
            takes 1.5 times as long for transformers and 2.5 times for a ResNet, whose patches are nine times its input;
            see `curvature.LARGEST_FACTOR` for the memory.
        activation_bits: Widths for which to gather the loss change of rounding inputs; see `activations`.
        halves: The half, 0 or 1, that each batch's curvature belongs to; None: batches alternate.

    Returns:
        Statistics, the same in every process. They cost one forward and one backward pass, and the memory of one
        gradient per layer. The model's weights, gradients and flags are restored.

    Raises:
        CalibrationError: The loss of a batch is not finite, or does not depend on the layers.
    """
    device = model_device(model)
    total_examples = sum(num_examples(batch) for batch in batches)
    sums = {layer.name: _Sums() for layer in layers}
    half_of = [index % 2 for index in range(len(batches))] if halves is None else halves
    curvatures = HalvedCurvature(model, layers if curvature else [], batches, half_of)
    activations = {
        layer.name: ActivationSums(layer, activation_bits)
        for layer in layers
        if activation_bits and may_quantise_input(layer.kind, layer.tied)
    }
    batch_losses = torch.zeros(len(batches), dtype=torch.float64)
    with torch.enable_grad(), _only_gradients_of(model, layers), _watched(model, layers, sums, curvatures, activations):
        with failing_together():
            for index, batch in own_share(batches):
                curvatures.now = half_of[index]
                value = loss(model, to_device(batch, device))
                _check(value, index, len(batches))
                share = num_examples(batch) / total_examples
                (value * share).backward()  # type: ignore[no-untyped-call]
                batch_losses[index] = value.detach()
                del value  # this frees the graph, whose hooks hold the layers' inputs
                advance()
        weight_gradients = {layer.name: sum_over_processes(_dense_gradient(layer.weight)) for layer in layers}
    for layer_sums in sums.values():
        layer_sums.totals = sum_over_processes(layer_sums.totals)
        layer_sums.extremes = max_over_processes(layer_sums.extremes)
    statistics = {}
    for layer in layers:
        gradient = weight_gradients.pop(layer.name)
        if not torch.isfinite(gradient).all():
            raise CalibrationError(
                f"the gradient of layer {layer.name!r} is not finite, though the loss is. Load the model in another "
                "dtype (float16 overflows where bfloat16 and float32 do not)."
            )
        factors = curvatures.curvature_of(layer.name)
        if factors and not factors["curvature"].is_finite:
            raise CalibrationError(
                f"the second moments of layer {layer.name!r} overflow: its inputs or gradients are too large for "
                "float32 (3e38). Check the scale of the inputs and the loss, or keep this layer out with "
                "modules_to_not_convert."
            )
        statistics[layer.name] = replace(
            sums[layer.name].statistics(gradient),
            gradient=as_matrix(gradient, layer.kind).float() if gradients else None,
            **factors,
            activations=activations[layer.name].statistics(total_examples) if layer.name in activations else None,
        )
    losses = sum_over_processes(batch_losses).tolist()
    mean = sum(value * num_examples(batch) for value, batch in zip(losses, batches, strict=True)) / total_examples
    return Calibration(statistics, mean, total_examples, tuple(losses))


def _check(loss: Tensor, index: int, num_batches: int) -> None:
    """Raises an error for a loss that is not finite or has no gradient."""
    if not torch.isfinite(loss).all():
        raise CalibrationError(
            f"the loss of calibration batch {index + 1} of {num_batches} is {loss.item()}. "
            "Check that batch's rows and labels, and the model's dtype (float16 overflows where bfloat16 does not)."
        )
    if not loss.requires_grad:
        raise CalibrationError(
            "the loss does not depend on any layer that could be compressed. "
            "Check that the model's forward is differentiable and that the layers are used in it."
        )


def _dense_gradient(weight: nn.Parameter) -> Tensor:
    if weight.grad is None:
        return torch.zeros_like(weight)
    return weight.grad.to_dense() if weight.grad.is_sparse else weight.grad


def _moments(total: float, square: float, count: float) -> Moments:
    mean = total / count
    return Moments(mean, max(square / count - mean**2, 0.0), int(count))


@contextmanager
def _only_gradients_of(model: nn.Module, layers: list[Layer]) -> Iterator[None]:
    """Lets only the layers' weights require a gradient, from zero; restores flags and gradients afterwards."""
    parameters = list(model.parameters())
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    wanted = {id(layer.weight) for layer in layers}
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, (requires_grad, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def _watched(
    model: nn.Module,
    layers: list[Layer],
    sums: dict[str, _Sums],
    halves: HalvedCurvature,
    activations: dict[str, ActivationSums],
) -> Iterator[None]:
    """Registers hooks that feed the sums; a tied layer counts the calls of every module that uses its weight."""
    handles = []
    for layer in layers:
        hook = _input_hook(sums[layer.name], activations.get(layer.name))
        for module in modules_of(model, layer):
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if layer.name in halves.sums:
                output_hook = _output_hook(halves, layer.name)
                handles.append(module.register_forward_hook(output_hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(layer_sums: _Sums, activations: ActivationSums | None) -> Callable[..., tuple[Any, Any] | None]:
    def watch(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any] | None:
        values = layer_input(arguments, keywords)
        if values.numel():  # a call of an expert without tokens measures nothing
            layer_sums.add_call()
        if not values.is_floating_point():
            return None
        layer_sums.add_inputs(values)
        # An alias of the input that this layer alone uses: its gradient is that of an error in this layer's input (the
        # e_i of Eq. 3), without the paths by which other layers and residual connections use the same tensor.
        values = values.view_as(values)
        if not values.requires_grad:  # the model's own input, or the output of frozen layers
            values = values.detach().requires_grad_()
        values.register_hook(layer_sums.add_gradient)  # type: ignore[no-untyped-call]
        if activations is not None:
            seen = values.detach()  # no copy: autograd keeps it for the weight's gradient
            values.register_hook(lambda gradient: activations.add(seen, gradient))  # type: ignore[no-untyped-call]
        return with_layer_input(values, arguments, keywords)

    return watch


def _output_hook(
    halves: HalvedCurvature, name: str
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
    def watch(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad:
            inputs = layer_input(arguments, keywords).detach()  # no copy: autograd keeps it for the weight's gradient
            output.register_hook(lambda gradient: halves.add(name, module, inputs, gradient))  # type: ignore[no-untyped-call]

    return watch


def layer_input(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Returns the input tensor of a layer's call, given by position or by name."""
    values = arguments[0] if arguments else next(iter(keywords.values()))
    assert isinstance(values, Tensor)
    return values


def with_layer_input(
    values: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replaces the input tensor in the arguments of a layer's call, for a forward pre-hook to return."""
    if arguments:
        return (values, *arguments[1:]), keywords
    return arguments, {**keywords, next(iter(keywords)): values}
