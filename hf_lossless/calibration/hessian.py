"""Products `H v` with the Hessian of the mean loss, by differentiating twice, and its trace for each layer.

Notation: w_l is the weight of layer l, a matrix [out, in] of n_l numbers; f(w) the mean loss over the examples;
`H = d2f / dw dw` over the layers asked for, with the blocks H_lm. A vector v has one matrix v_l for every layer.

    (H v)_l = d/dw_l  sum_m <df/dw_m, v_m>                                         (Pearlmutter 1994)
    tr H_ll = E[v_l' (H v)_l],  v of independent random signs                      (Hutchinson 1990)

The cross terms `v_l' H_lm v_m` have mean zero, so one product gives an estimate for every layer at once.

curvlinops, the maintained library for such products, does not fit: its operators take pairs (inputs, targets) and a
criterion on the model's outputs, while a loss here is a function of (model, batch), often the model's own; they repeat
the forward pass for every product, while here the graph is built once and reused (on MiniLM 0.2 instead of 0.46 seconds
for a layer in the middle, 32 sentences); they do not support several processes; and they do not say which operation has
no second derivative.

Limits: a ReLU or a max pool is flat on both sides of its kink, so that the H of a convolutional network
misses the curvature that its kinks add up to over a step as large as a rounding error. Products have the weights' own
dtype: load a bfloat16 checkpoint in float32 before trusting them.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_lossless.calibration.units import in_unit, unit_of
from hf_lossless.data.batches import Batch, LossFunction, model_device, num_examples, to_device
from hf_lossless.data.processes import failing_together, max_over_processes, own_share, sum_over_processes
from hf_lossless.errors import CalibrationError, reason
from hf_lossless.storage.layers import Layer, as_matrix

Vectors = dict[str, Tensor]
"""A matrix [out, in] for each layer, by name."""

MatVec = Callable[[Vectors], Vectors]
"""Computes H v for the layers that v names."""

_LARGEST_UNIT = 2.0**64
"""Of a gradient; its inverse is the smallest. Vectors are divided by it before they meet weights and inputs."""

_NO_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")


def sub_sample(batches: Sequence[Batch], max_rows: int) -> list[Batch]:
    """Chooses whole batches of about `max_rows` rows, evenly spread over the list; at least one.

    Batches hold rows of similar length in order, so that the first batches would hold the shortest rows.

    Args:
        batches: All batches.
        max_rows: Rows wanted. The result has more only where a single batch is larger.

    Example:
        >>> [len(batch[0]) for batch in sub_sample([(torch.zeros(n, 1), None) for n in (4, 5, 6, 7)], 12)]
        [5, 7]
    """
    mean_rows = sum(map(num_examples, batches)) / len(batches)
    wanted = min(len(batches), max(1, int(max_rows / mean_rows)))
    while True:
        chosen = [batches[(2 * index + 1) * len(batches) // (2 * wanted)] for index in range(wanted)]
        if wanted == 1 or sum(map(num_examples, chosen)) <= max_rows:
            return chosen
        wanted -= 1


class HessianProducts:
    """The product `v -> H v` for the layers of one `hessian(...)` context, the same in every process.

    Attributes:
        num_products: Products computed so far.
    """

    def __init__(self, layers: list[Layer], gradients: list[dict[str, Tensor]]) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._gradients = gradients
        self._units = _units_of(layers, gradients)
        self.num_products = 0

    def __call__(self, vectors: Mapping[str, Tensor]) -> Vectors:
        """Computes H v for a vector on some or all of the layers; other layers' weights count as constants.

        Args:
            vectors: v_l [out, in] by layer name.

        Returns:
            (H v)_l [out, in] for the same layers, float32 (float64 for float64 weights, and where the gradient is so
            small or large that the product may not fit float32). Zeros where the loss does not depend on a weight, or
            does so linearly.

        Raises:
            CalibrationError: An operation has no second derivative, or it is not finite.
        """
        layers = [self._layers[name] for name in vectors]
        weights = [layer.weight for layer in layers]
        # H v scales with the gradient, whose unit this is; v / unit keeps the intermediate numbers of order one.
        unit = max(self._units[layer.name] for layer in layers)
        directions = [in_unit(_as_weight(vectors[layer.name], layer), unit) for layer in layers]
        products = [torch.zeros_like(weight, dtype=_precise(weight)) for weight in weights]
        with failing_together(), naming_what_has_no_derivative():
            for gradients in self._gradients:
                curved = [place for place, layer in enumerate(layers) if gradients[layer.name].requires_grad]
                if not curved:
                    continue
                parts = torch.autograd.grad(
                    [gradients[layers[place].name] for place in curved],
                    weights,
                    [directions[place] for place in curved],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for product, part in zip(products, parts, strict=True):
                    product += _dense(part)
        self.num_products += 1
        results = {}
        for layer, product in zip(layers, products, strict=True):
            total = sum_over_processes(product.contiguous())
            if not torch.isfinite(total).all():
                raise CalibrationError(
                    f"the second derivative of the loss with respect to layer {layer.name!r} is not finite. "
                    "Use theory='llc', which needs none, or leave the layer out with modules_to_not_convert."
                )
            results[layer.name] = as_matrix(total if unit == 1 else total.double() * unit, layer.kind)
        return results


def _units_of(layers: list[Layer], gradients: list[dict[str, Tensor]]) -> dict[str, float]:
    """Computes the unit of each layer's gradient, the same in every process, within bounds; 1 where there is none."""
    units = [max((unit_of(_dense(parts[layer.name])) for parts in gradients), default=0.0) for layer in layers]
    largest = max_over_processes(torch.tensor(units, dtype=torch.float64)).tolist()
    return {
        layer.name: min(max(unit, 1 / _LARGEST_UNIT), _LARGEST_UNIT) if unit else 1.0
        for layer, unit in zip(layers, largest, strict=True)
    }


@contextmanager
def hessian(
    model: nn.Module, batches: Sequence[Batch], layers: list[Layer], loss: LossFunction
) -> Iterator[HessianProducts]:
    """Opens a context for products with the Hessian of the mean loss with respect to the layers' weights.

    Costs one forward-backward pass over the batches; a product for all layers costs about two more, one for a single
    layer at most half of one, and less for later layers. The graphs of both passes stay in memory until the context
    ends, for every batch: give few (`sub_sample`). Weights, gradients and flags are restored afterwards.

    Args:
        model: In evaluation mode. Its weights must not change inside the context.
        batches: The same in every process; each process takes its share.
        layers: Layers to differentiate with respect to: one, or several for their cross terms too.
        loss: Mean loss of a batch.

    Raises:
        CalibrationError: An operation has no second derivative; the message names it. Fused attention kernels of
            PyTorch are replaced by the plain formula, which has one.

    Example:
        >>> from hf_lossless.data.batches import batch_loss
        >>> from hf_lossless.storage.layers import find_layers
        >>> model = nn.Linear(3, 2)
        >>> batch = (torch.randn(8, 3), torch.tensor([0, 1] * 4))
        >>> with hessian(nn.Sequential(model), [batch], find_layers(nn.Sequential(model)), batch_loss) as product:
        ...     product({"0": torch.ones(2, 3)})["0"].shape
        torch.Size([2, 3])
    """
    device = model_device(model)
    total_examples = sum(map(num_examples, batches))
    weights = [layer.weight for layer in layers]
    gradients: list[dict[str, Tensor]] = []
    with torch.enable_grad(), only_these_require_gradients(model, weights):
        with failing_together(), naming_what_has_no_derivative(), sdpa_kernel(SDPBackend.MATH):
            for _, batch in own_share(list(batches)):
                value = loss(model, to_device(batch, device)) * (num_examples(batch) / total_examples)
                if not value.requires_grad:  # the loss does not depend on these layers
                    continue
                refuse_once_differentiable(value)
                parts = torch.autograd.grad(
                    value, weights, create_graph=True, allow_unused=True, materialize_grads=True
                )
                gradients.append({layer.name: part for layer, part in zip(layers, parts, strict=True)})
        yield HessianProducts(layers, gradients)


@dataclass(frozen=True)
class TraceEstimate:
    """Hutchinson's estimate of tr H_ll for one layer.

    Attributes:
        trace: The mean over the probes.
        standard_error: Standard error of that mean; infinite for one probe.
        num_probes: Number of products, shared by all layers.
        converged: Whether the tolerance was met.
    """

    trace: float
    standard_error: float
    num_probes: int
    converged: bool


def block_traces(
    product: MatVec,
    like: Mapping[str, Tensor],
    *,
    tolerance: float = 0.1,
    min_probes: int = 8,
    max_probes: int = 32,
    seed: int = 0,
) -> dict[str, TraceEstimate]:
    """Estimates the trace tr H_ll of every layer, with one product for each probe.

    The variance of one probe is `2 ||offdiagonal(H_ll)||^2 + sum_(m != l) ||H_lm||^2` (Frobenius). The second part
    comes from probing all layers at once, and is large in trained networks (see `theories.hawq`): give one layer at a
    time where each trace must be accurate.

    Args:
        product: Computes H v.
        like: A matrix [out, in] for every layer, with the shape, dtype and device of its probes.
        tolerance: Stop when the standard error of every layer is at most this share of the absolute estimate.
        min_probes: Least number of probes before the standard error is trusted.
        max_probes: Largest number of probes.
        seed: Seed of the signs, which are drawn on the CPU, so that they are the same in every process.

    Returns:
        Estimates by layer name.

    Example:
        >>> H = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
        >>> product = lambda v: {"a": (H @ v["a"].flatten()).view(1, 2)}
        >>> estimate = block_traces(product, {"a": torch.zeros(1, 2)})["a"]
        >>> abs(estimate.trace - 3.0) < 4 * estimate.standard_error
        True
    """
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[float]] = {name: [] for name in like}
    estimates: dict[str, TraceEstimate] = {}
    for probe in range(1, max_probes + 1):
        signs = {name: random_signs(matrix.shape, generator).to(matrix) for name, matrix in like.items()}
        for name, image in product(signs).items():
            samples[name].append((signs[name] * image).sum(dtype=torch.float64).item())
        estimates = {name: _mean_and_error(values, tolerance) for name, values in samples.items()}
        if probe >= min_probes and all(estimate.converged for estimate in estimates.values()):
            break
    return estimates


def random_signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draws +1 or -1 with equal probability, float32 on the CPU."""
    return torch.randint(0, 2, shape, generator=generator).float().mul_(2).sub_(1)


def _mean_and_error(values: list[float], tolerance: float) -> TraceEstimate:
    count = len(values)
    mean = math.fsum(values) / count
    squares = math.fsum((value - mean) ** 2 for value in values)
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else math.inf
    return TraceEstimate(mean, error, count, error <= tolerance * abs(mean))


def _as_weight(matrix: Tensor, layer: Layer) -> Tensor:
    """Reshapes a matrix [out, in] to the shape and dtype of the layer's weight."""
    weight = layer.weight
    matrix = matrix.T if layer.kind == "conv1d" else matrix
    return matrix.reshape(weight.shape).to(weight)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _precise(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


@contextmanager
def only_these_require_gradients(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Lets only the given weights require gradients, and restores the flags afterwards.

    Gradients are computed by `torch.autograd.grad`, so that `.grad` is never touched.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = set(map(id, weights))
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def _no_second_derivative(operation: str, detail: str) -> CalibrationError:
    return CalibrationError(
        f"the loss has no second derivative: {operation} can be differentiated only once{detail}. "
        "Load the model with attn_implementation='eager' where attention is the cause, uncompiled and without custom "
        "kernels; or use theory='llc', which needs first derivatives at most."
    )


@contextmanager
def naming_what_has_no_derivative() -> Iterator[None]:
    """Converts torch's error on a missing second derivative into a CalibrationError that names the operation."""
    try:
        yield
    except RuntimeError as error:
        message = reason(error)
        missing = _NO_DERIVATIVE.search(message)
        if missing is not None:
            raise _no_second_derivative(missing[1], "") from error
        if "double backward" in message.lower() or "once_differentiable" in message:
            raise _no_second_derivative("one of its operations", f" ({message})") from error
        raise


def refuse_once_differentiable(loss: Tensor) -> None:
    """Refuses a `torch.autograd.Function` whose backward is marked @once_differentiable.

    torch's own check does not work with `torch.autograd.grad`: the second derivative through such a function would
    silently be zero.
    """
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        assert node is not None
        function = getattr(node, "_forward_cls", None)
        if function is not None and _is_marked(function.backward):
            raise _no_second_derivative(function.__name__, " (its backward is marked @once_differentiable)")
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)


def _is_marked(backward: Callable[..., object]) -> bool:
    """Tells whether a backward is wrapped by `once_differentiable`."""
    code = getattr(backward, "__code__", None)
    return hasattr(backward, "__wrapped__") and "once_differentiable" in getattr(code, "co_qualname", "")
