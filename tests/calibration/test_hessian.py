"""Hessian-vector products against the dense Hessian; in one process and in two."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY_MODELS
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D
from two_processes import in_two_processes

from hf_lossless.calibration.hessian import block_traces, hessian, sub_sample
from hf_lossless.data.batches import batch_loss, num_examples
from hf_lossless.errors import CalibrationError
from hf_lossless.storage.layers import Layer, as_matrix, find_layers
from hf_lossless.theories import cet, hawq
from hf_lossless.theories.problem import Problem


class Model(nn.Module):
    """One of every kind of layer, one used twice, one not at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 8)
        self.convolution = nn.Conv2d(2, 2, 2, groups=2)
        self.conv1d = Conv1D(3, 2)
        self.twice = nn.Linear(3, 3)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        images = self.embedding(ids).view(-1, 2, 2, 2)
        hidden = torch.tanh(self.conv1d(self.convolution(images).flatten(1)))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))


def batches_of(sizes: tuple[int, ...] = (5, 3)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(0, 5, (rows,), generator=generator), torch.randint(0, 3, (rows,), generator=generator))
        for rows in sizes
    ]


def dense_hessian(model: nn.Module, batches, layers: list[Layer], loss=batch_loss) -> Tensor:
    """d2f / dw dw over all layers, each as [out, in], by torch's own function."""
    total = sum(map(num_examples, batches))
    buffers = dict(model.named_parameters()) | dict(model.named_buffers())

    class Called(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = weights

        def forward(self, *arguments, **keywords):
            return functional_call(model, buffers | self.weights, arguments, keywords)

    def mean_loss(*weights: Tensor) -> Tensor:
        named = {f"{layer.name}.weight": weight for layer, weight in zip(layers, weights, strict=True)}
        called = Called(named)
        return sum(loss(called, batch) * num_examples(batch) / total for batch in batches)

    blocks = torch.autograd.functional.hessian(mean_loss, tuple(layer.weight.detach().clone() for layer in layers))
    rows = []
    for row, (left, parts) in enumerate(zip(layers, blocks, strict=True)):
        columns = []
        for right, part in zip(layers, parts, strict=True):
            part = part.reshape(left.weight.numel(), *right.weight.shape)
            part = torch.stack([as_matrix(one, right.kind).flatten() for one in part])
            part = part.view(*left.weight.shape, -1)
            if left.kind == "conv1d":
                part = part.transpose(0, 1)
            columns.append(part.reshape(left.weight.numel(), -1))
        rows.append(torch.cat(columns, 1))
        assert row < len(layers)
    return torch.cat(rows)


def flat(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([vector.flatten() for vector in vectors.values()])


def random_vectors(layers: list[Layer], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.name: torch.randn(layer.matrix.shape, generator=generator, dtype=layer.weight.dtype) for layer in layers
    }


def test_all_layers_at_once():
    model, batches = Model().double(), batches_of()
    layers = find_layers(model)
    assert {layer.kind for layer in layers} == {"embedding", "conv2d", "conv1d", "linear"}
    vectors = random_vectors(layers)
    with hessian(model, batches, layers, batch_loss) as product:
        result = product(vectors)
        again = product(vectors)
    torch.testing.assert_close(flat(result), dense_hessian(model, batches, layers) @ flat(vectors))
    torch.testing.assert_close(flat(again), flat(result))
    assert product.num_products == 2
    assert flat(result).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["embedding", "convolution", "conv1d", "twice", "head"])
def test_one_layer(name):
    model, batches = Model().double(), batches_of()
    layers = find_layers(model)
    layer = next(layer for layer in layers if layer.name == name)
    vectors = random_vectors([layer])
    expected = dense_hessian(model, batches, [layer]) @ flat(vectors)
    with hessian(model, batches, [layer], batch_loss) as alone, hessian(model, batches, layers, batch_loss) as product:
        torch.testing.assert_close(flat(product(vectors)), expected)
        with pytest.raises(KeyError):
            alone({"other": torch.zeros(1, 1)})
    assert product(vectors)[name].shape == layer.matrix.shape


def test_a_sparse_embedding():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    sparse = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Tanh(), nn.Linear(4, 3)).double()
    sparse.load_state_dict(dense.state_dict())
    results = []
    for model in (dense, sparse):
        layers = find_layers(model)
        with hessian(model, batches_of(), layers, batch_loss) as product:
            results.append(flat(product(random_vectors(layers))))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "gpt2"])
def test_architectures_have_second_derivatives(name, place):
    """Fused attention kernels have none; hessian() does without them. Against the difference of two gradients."""
    tiny = TINY_MODELS[name]
    model = tiny.build().double()
    batches = [tiny.batch(dtype=torch.float64)]
    layers = find_layers(model)
    layer = layers[place]  # GPT-2's first, its embedding, is tied to the head
    vectors = random_vectors([layer])
    with hessian(model, batches, layers, batch_loss) as product:
        result = product(vectors)[layer.name]
    # Small enough that no ReLU turns within it; transformers computes language models' losses in float32.
    step = (1e-2 if name == "gpt2" else 1e-6) / vectors[layer.name].norm()
    gradients = []
    for sign in (1, -1):
        with torch.no_grad():
            layer.matrix.add_(sign * step * vectors[layer.name])
        gradient = torch.autograd.grad(batch_loss(model, batches[0]), layer.weight)[0]
        gradients.append(as_matrix(gradient, layer.kind))
        with torch.no_grad():
            layer.matrix.sub_(sign * step * vectors[layer.name])
    expected = (gradients[0] - gradients[1]) / (2 * step)
    assert (result - expected).norm() < 1e-3 * expected.norm()


def test_a_layer_that_is_not_used_or_acts_linearly():
    model, batches = Model(), batches_of()
    layers = find_layers(model)
    unused = next(layer for layer in layers if layer.name == "unused")
    with hessian(model, batches, [unused], batch_loss) as product:
        assert not product({"unused": torch.ones(2, 2)})["unused"].any()
    with hessian(model, batches, layers, batch_loss) as product:
        assert not product({"unused": torch.ones(2, 2)})["unused"].any()
    with hessian(model, batches, layers, lambda model, batch: model.head(torch.ones(1, 3)).sum()) as product:
        assert not product({"head": torch.ones(3, 3)})["head"].any()
        assert not product({"twice": torch.ones(3, 3)})["twice"].any()


def test_bfloat16_is_summed_in_float32():
    model = nn.Sequential(nn.Linear(4, 3)).bfloat16()
    batches = [(torch.randn(6, 4, dtype=torch.bfloat16), torch.arange(6) % 3)]
    with hessian(model, batches, find_layers(model), batch_loss) as product:
        assert product({"0": torch.ones(3, 4)})["0"].dtype == torch.float32


def test_the_model_is_left_as_it_was():
    model, batches = Model(), batches_of()
    model.head.weight.requires_grad_(False)
    model.twice.weight.grad = torch.full((3, 3), 7.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    layers = find_layers(model)
    with torch.no_grad(), hessian(model, batches, layers, batch_loss) as product:
        product(random_vectors(layers))
        assert model.head.weight.requires_grad
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(model.twice.weight.grad, torch.full((3, 3), 7.0)) and model.head.bias.grad is None
    with pytest.raises(RuntimeError, match="stop"), hessian(model, batches, layers, batch_loss):
        raise RuntimeError("stop")
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


class Cube(torch.autograd.Function):
    """A kernel as they are often written: its backward is no formula that torch could differentiate."""

    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values**3

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class WithKernel(nn.Module):
    def __init__(self, kernel) -> None:
        super().__init__()
        self.first, self.last, self.kernel = nn.Linear(4, 4), nn.Linear(4, 3), kernel

    def forward(self, values: Tensor) -> Tensor:
        return self.last(self.kernel(self.first(values)))


REAL = [(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3)]


def test_once_differentiable_is_named():
    model = WithKernel(Cube.apply)
    with pytest.raises(CalibrationError, match=r"Cube can be differentiated only once.*theory='llc'"):
        with hessian(model, REAL, find_layers(model), batch_loss):
            pass
    # The last layer does not lie behind the kernel.
    with hessian(model, REAL, find_layers(model)[1:], batch_loss) as product:
        assert product({"last": torch.ones(3, 4)})["last"].any()


def test_a_missing_derivative_is_named():
    def fused(values: Tensor) -> Tensor:
        heads = values.view(1, 1, -1, 4)
        attended, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads, heads, heads)
        return attended.view(-1, 4)

    model = WithKernel(fused)
    with pytest.raises(CalibrationError, match=r"_scaled_dot_product_flash_attention_for_cpu_backward.*eager"):
        with hessian(model, REAL, find_layers(model), batch_loss) as product:
            product(random_vectors(find_layers(model)))


def test_other_errors_pass():
    def broken(values: Tensor) -> Tensor:
        raise RuntimeError("something else")

    model = WithKernel(broken)
    with pytest.raises(RuntimeError, match="something else"), hessian(model, REAL, find_layers(model), batch_loss):
        pass


def test_a_second_derivative_that_is_not_finite():
    model = WithKernel(lambda values: (values * 0).clamp(min=0).sqrt() * 1e-3)
    with pytest.raises(CalibrationError, match="layer 'first' is not finite"):
        with hessian(model, REAL, find_layers(model), batch_loss) as product:
            product(random_vectors(find_layers(model)))


def outcome(sizes: tuple[int, ...]) -> dict:
    """A product, traces, and CET's and HAWQ's predictions, JSON-ready."""
    model, batches = Model().double(), batches_of(sizes)
    layers = find_layers(model)
    candidates = {
        layer.name: [SimpleNamespace(kind="grid", error=lambda matrix: 0.1 * torch.cos(100 * matrix))]
        for layer in layers
    }
    problem = Problem(
        model=model, batches=batches, loss=batch_loss, layers=layers, calibration=None, candidates=candidates
    )
    with hessian(model, batches, layers, batch_loss) as product:
        found = {"product": flat(product(random_vectors(layers))).tolist()}
    for theory in (hawq, cet):
        found[theory.__name__] = [one.loss_change for group in theory.predict(problem).values() for one in group]
    found["refused"] = _refusal(model, layers, batches)
    return found


def _refusal(model: nn.Module, layers: list[Layer], batches: list) -> str:
    def loss(model: nn.Module, batch) -> Tensor:
        return Cube.apply(batch_loss(model, batch)) if len(batch[0]) == 3 else batch_loss(model, batch)

    try:
        with hessian(model, batches, layers, loss):
            return "nothing"
    except CalibrationError as error:
        return str(error)


SIZES = {"uneven": (5, 3, 4), "one-batch": (5,)}  # with one, the second process has none


def outcomes() -> dict:
    return {name: outcome(sizes) for name, sizes in SIZES.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found."""
    return in_two_processes(outcomes, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("sizes", SIZES)
def test_two_processes_agree_with_one(two_processes, sizes):
    one = outcome(SIZES[sizes])
    refusals = [found[sizes].pop("refused") for found in two_processes]
    assert two_processes[0][sizes] == two_processes[1][sizes]
    for key, values in two_processes[0][sizes].items():
        assert values == pytest.approx(one[key], rel=1e-6, abs=1e-12), key
    assert max(map(abs, one["product"])) > 1e-3
    if sizes == "uneven":
        assert refusals[0].startswith("1 other process(es)") and "Cube can be differentiated only once" in refusals[1]


@pytest.mark.parametrize(
    ("sizes", "max_rows", "expected"),
    [
        ((32, 32, 32, 32), 32, (2,)),
        ((32, 32, 32, 32), 64, (1, 3)),
        ((32, 32, 32, 20), 1000, (0, 1, 2, 3)),
        ((32,), 1, (0,)),
        ((4, 4, 40), 16, (1,)),
        ((3,), 100, (0,)),
    ],
    ids=str,
)
def test_sub_sample(sizes, max_rows, expected):
    batches = batches_of(sizes)
    assert [next(i for i, one in enumerate(batches) if one is chosen) for chosen in sub_sample(batches, max_rows)] == [
        *expected
    ]


def test_traces_within_their_own_error():
    model, batches = Model().double(), batches_of()
    layers = [layer for layer in find_layers(model) if layer.name != "unused"]
    like = {layer.name: layer.matrix for layer in layers}
    with hessian(model, batches, layers, batch_loss) as product:
        together = block_traces(product, like, tolerance=0.0, min_probes=64, max_probes=64)
        alone = {}
        for layer in layers:
            alone |= block_traces(product, {layer.name: layer.matrix}, tolerance=0.0, min_probes=64, max_probes=64)
    for layer in layers:
        exact = dense_hessian(model, batches, [layer]).trace().item()
        for estimate in (together[layer.name], alone[layer.name]):
            assert abs(estimate.trace - exact) < 3 * estimate.standard_error
            assert not estimate.converged and estimate.num_probes == 64


def test_traces_stop_when_they_are_known():
    matrix = torch.diag(torch.arange(1.0, 7.0))  # the trace of a diagonal matrix is known after one probe

    def product(vectors):
        return {name: (matrix @ vector.flatten()).view(2, 3) for name, vector in vectors.items()}

    estimate = block_traces(product, {"a": torch.zeros(2, 3)}, min_probes=4)["a"]
    assert (estimate.trace, estimate.standard_error, estimate.num_probes, estimate.converged) == (21.0, 0.0, 4, True)
    zero = block_traces(lambda vectors: {"a": 0 * vectors["a"]}, {"a": torch.zeros(2, 3)})["a"]
    assert zero.trace == 0 and zero.converged
    single = block_traces(product, {"a": torch.zeros(2, 3)}, min_probes=1, max_probes=1)["a"]
    assert math.isinf(single.standard_error) and not single.converged


def test_traces_depend_on_the_seed_alone():
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    matrix += matrix.T.clone()

    def product(vectors):
        return {name: (matrix @ vector.flatten()).view(2, 3) for name, vector in vectors.items()}

    first, second, third = (
        block_traces(product, {"a": torch.zeros(2, 3)}, seed=seed, max_probes=8)["a"].trace for seed in (0, 0, 1)
    )
    assert first == second != third


@pytest.mark.parametrize("power", [-120, -100, -60, 60, 100])
def test_a_tiny_or_huge_loss(power):
    """Products with a loss of so many powers of two are as many times those of the loss itself."""
    model, batches = Model(), batches_of()
    layers = [layer for layer in find_layers(model) if layer.name != "unused"]
    vectors = random_vectors(layers)
    with hessian(model, batches, layers, batch_loss) as product:
        expected = flat(product(vectors)).double()
    with hessian(model, batches, layers, lambda model, batch: batch_loss(model, batch) * 2.0**power) as product:
        found = flat(product(vectors))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found / 2.0**power, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("power", [-90, 90])
def test_inputs_so_small_that_the_second_derivative_is_no_number_of_float32(power):
    """H has the inputs squared."""
    inputs, targets = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    layers = find_layers(model)
    vectors = random_vectors(layers)
    model[0].weight.data.zero_()
    with hessian(model, [(inputs, targets)], layers, batch_loss) as product:
        expected = product(vectors)["0"].double()
    with hessian(model, [(inputs * 2.0**power, targets)], layers, batch_loss) as product:
        found = product(vectors)["0"]
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found / 4.0**power, expected, rtol=1e-3, atol=1e-5)
