"""Kronecker factors against one backward pass per row, and against curvature that is known exactly."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY_MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.calibration import curvature as module_under_test
from hf_lossless.calibration.curvature import (
    CurvatureSums,
    KroneckerFactors,
    second_order_change,
    smoothed_counts,
)
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.data.batches import batch_loss
from hf_lossless.errors import CalibrationError
from hf_lossless.storage.layers import Layer, find_layers, modules_of

Use = tuple[str, Tensor, Tensor]  # kind of module, input and output gradient of one call for one row


def close(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    expected = expected.float()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def rows_of(batch) -> list:
    """The rows of a batch, each as a batch of its own."""
    if isinstance(batch, dict):
        return [
            dict(zip(batch, values, strict=True)) for values in zip(*(v.split(1) for v in batch.values()), strict=True)
        ]
    return list(zip(*(value.split(1) for value in batch), strict=True))


def uses_of(model: nn.Module, layer: Layer, batch) -> list[Use]:
    """Input and output gradient of every call, one row and one backward pass at a time."""
    uses: list[Use] = []
    for row in rows_of(batch):
        calls = []

        def note(module, arguments, keywords, output, calls=calls):
            calls.append((module, (*arguments, *keywords.values())[0].detach(), output))

        handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules_of(model, layer)]
        loss = batch_loss(model, row)
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(loss, [output for *_, output in calls])
        for (module, inputs, _), gradient in zip(calls, gradients, strict=True):
            uses.append((type(module).__name__, inputs, gradient))
    return uses


def good_turing(counts: list[int]) -> list[float]:
    """Counts with the share of what was never seen, token by token."""
    unseen, once, total = counts.count(0), max(counts.count(1), 1), sum(counts)
    if not unseen or not total:
        return [float(count) for count in counts]
    share = min(once / total, 0.5)
    return [share * total / unseen if count == 0 else (1 - share) * count for count in counts]


def reference(layer: Layer, uses: list[Use], num_rows: int, groups: int = 1) -> tuple[Tensor, Tensor, float]:
    """R, C and T/N by a loop over positions; C of each group."""
    num_outputs, num_inputs = layer.matrix.shape
    rows = torch.zeros(num_outputs, num_outputs, dtype=torch.float64)
    columns = torch.zeros(groups, num_inputs, num_inputs, dtype=torch.float64)
    positions = 0
    for kind, inputs, gradient in uses:
        if kind == "Conv2d":
            module = layer.module
            patches = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
            pairs = zip(patches[0].T, gradient[0].flatten(1).T, strict=True)
        else:
            pairs = zip(
                inputs.reshape(-1, *inputs.shape[2:]) if kind == "Embedding" else inputs.reshape(-1, inputs.shape[-1]),
                gradient.reshape(-1, gradient.shape[-1]),
                strict=True,
            )
        for x, g in pairs:
            if not g.abs().max():
                continue
            positions += 1
            if kind == "Embedding":
                x, g = g, F.one_hot(x, num_outputs)
            x, g = x.double().view(groups, -1), g.double()
            rows += torch.outer(g, g)
            columns += torch.stack([torch.outer(part, part) for part in x])
    if uses and all(kind == "Embedding" for kind, *_ in uses):
        rows = torch.tensor(good_turing([int(count) for count in rows.diagonal()])).double().diag()
    return rows / max(positions, 1), columns / max(positions, 1), positions / num_rows


def check_layer(layer: Layer, found: KroneckerFactors, uses: list[Use], num_rows: int) -> None:
    """scale R (x) C is T/N (mean g g') (x) (mean x x'), with mean diagonals of one."""
    rows, columns, per_row = reference(layer, uses, num_rows)
    if not rows.any():
        assert found.scale == 0 and not found.rows.any() and not found.columns.any()
        return
    rows_mean, columns_mean = rows.diagonal().mean(), columns[0].diagonal().mean()
    assert found.scale == pytest.approx((per_row * rows_mean * columns_mean).item(), rel=1e-4)
    close(found.rows, (rows.diagonal() if found.rows.ndim == 1 else rows) / rows_mean)
    close(found.columns, (columns[0].diagonal() if found.columns.ndim == 1 else columns[0]) / columns_mean)


def check_model(model: nn.Module, batch, batches: list, skip: tuple[str, ...] = ()) -> dict[str, KroneckerFactors]:
    layers = find_layers(model)
    calibration = calibrate(model, batches, layers, batch_loss, gradients=True, curvature=True)
    found = {}
    for layer in layers:
        statistics = calibration.layers[layer.name]
        found[layer.name] = statistics.curvature
        if layer.name not in skip:
            check_layer(layer, statistics.curvature, uses_of(model, layer, batch), calibration.num_examples)
    return found


def dense(factor: Tensor) -> Tensor:
    return (torch.diag(factor) if factor.ndim == 1 else factor).double()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def classified(rows: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, *(shape or (6,)), generator=generator) + 0.3
    return inputs, torch.randint(0, 3, (rows,), generator=generator)


def images(rows: int = 5, channels: int = 3, size: int = 7) -> tuple[Tensor, Tensor]:
    return classified(rows, channels, size, size)


@pytest.mark.parametrize("size", [1, 3, 8], ids="batches-of-{}".format)
def test_linear_layers(size):
    """The batches do not matter, and the last may be smaller."""
    inputs, targets = classified(8)
    batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    check_model(network(), (inputs, targets), batches)


CONVOLUTIONS = {
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2},
    "oblong": {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0)},
    "dilated": {"kernel_size": 2, "dilation": 2, "padding": (0, 1)},
    "pointwise": {"kernel_size": 1},
}


class Pixels(nn.Module):
    """A convolution, an activation in place and a mean over pixels."""

    def __init__(self, convolution: nn.Module, channels: int = 4):
        super().__init__()
        self.conv, self.head = convolution, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x), inplace=True).square().mean((-2, -1)))


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("patch_bytes", [1, 2**26], ids=["image-by-image", "at-once"])
def test_convolutions(options, patch_bytes, monkeypatch):
    monkeypatch.setattr(module_under_test, "PATCH_BYTES", patch_bytes)
    torch.manual_seed(0)
    inputs, targets = images()
    model = Pixels(nn.Conv2d(3, 4, **options)).eval().to(memory_format=torch.channels_last)
    check_model(model, (inputs, targets), [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [3, (2, 5)], ids=["odd", "even"])
def test_padding_by_name(kernel):
    """The patches are those that the convolution multiplies."""
    for padding in ("same", "valid"):
        module = nn.Conv2d(2, 3, kernel, padding=padding, dilation=(1, 2), bias=False)
        values = images(2, 2, size=12)[0]
        output = module(values)
        [(patches, pixels)] = module_under_test._patches(module, values, output)
        torch.testing.assert_close((module.weight.flatten(1) @ patches[0]).T, pixels)


def test_a_single_image_without_a_batch():
    module = nn.Conv2d(2, 3, 3)
    image = images(1, 2)[0][0]
    [(patches, pixels)] = module_under_test._patches(module, image, module(image))
    assert patches.shape == (1, 18, 25) and pixels.shape == (25, 3)


@pytest.mark.parametrize("groups", [2, 4], ids=["groups", "depthwise"])
def test_grouped_convolutions_keep_the_partial_traces(groups):
    torch.manual_seed(0)
    inputs, targets = images(channels=4)
    inputs = inputs * torch.tensor([0.1, 1, 3, 1])[:, None, None]
    model = Pixels(nn.Conv2d(4, 8, 3, groups=groups), 8).eval()
    layer = find_layers(model)[0]
    [found, _] = check_model(model, (inputs, targets), [(inputs, targets)], skip=("conv",)).values()
    rows, columns, per_row = reference(layer, uses_of(model, layer, (inputs, targets)), 5, groups)
    # The sum of the groups' products, each with a diagonal of rows that is zero outside of the group.
    group_rows = rows.diagonal().view(groups, -1)
    traces = columns.diagonal(dim1=1, dim2=2).sum(1)
    over_columns = per_row * (group_rows * traces[:, None]).flatten()
    over_rows = per_row * torch.einsum("gk,gij->ij", group_rows, columns)
    assert found.rows.shape == (8,)
    close(found.scale * found.rows * found.columns.trace(), over_columns)
    close(found.scale * found.rows.sum() * found.columns, over_rows)
    assert found.columns.diagonal().mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_embeddings_count_tokens(sparse):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3)).eval()
    batch = torch.tensor([[1, 2], [2, 2], [6, 0]]), torch.tensor([0, 1, 2])
    factors = check_model(model, batch, [(batch[0][:1], batch[1][:1]), (batch[0][1:], batch[1][1:])])["0"]
    # 6 tokens, 3 of which were seen once: the other 3 share a half of the whole
    close(factors.rows, torch.tensor([0.5, 0.5, 1.5, 1, 1, 1, 0.5]) * 7 / 6)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_smoothed_counts(counts):
    found = smoothed_counts(torch.tensor(counts, dtype=torch.float32))
    torch.testing.assert_close(found, torch.tensor(good_turing(counts)))
    assert found.sum().item() == pytest.approx(sum(counts), rel=1e-5)
    if any(counts):
        assert found.all()


@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "gpt2", "bert-mlm", "convnext"])
def test_architectures(name):
    """Every layer but those whose sums are no one product, and positions looked up once for all rows."""
    tiny = TINY_MODELS[name]
    model, batch = tiny.build(), tiny.batch(rows=4)
    others = [
        layer.name
        for layer in find_layers(model)
        if layer.tied or getattr(layer.module, "groups", 1) > 1 or "position" in layer.name or "wpe" in layer.name
    ]
    found = check_model(model, batch, [batch], skip=tuple(others))
    assert any(factors.scale > 0 for factors in found.values()) and len(others) < len(found) / 2


def test_one_output_for_all_rows():
    """Positions looked up once: the square of the rows' sum, in which the rows' cross terms remain."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.head = nn.Embedding(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(x + self.positions(torch.tensor([2]))))

    torch.manual_seed(0)
    model, batch = Positions().eval(), classified(8)
    found = calibrate(model, [batch], find_layers(model), batch_loss, gradients=True, curvature=True)
    gradient = found.layers["positions"].gradient[2]
    factors = found.layers["positions"].curvature
    close(factors.rows, torch.tensor([0.125, 0.125, 0.5, 0.125, 0.125]) * 5)  # one was seen, and seen once
    close(factors.scale * 5 * factors.columns, 8 * torch.outer(gradient, gradient))


def test_padding_is_left_out():
    """Padded positions have inputs, but no part in the loss; in the last block nor has any token but the first."""
    tiny = TINY_MODELS["bert"]
    model, batch = tiny.build(), tiny.batch(rows=4)  # the first row has two tokens of padding

    def factors(batch):
        calibration = calibrate(model, [batch], find_layers(model), batch_loss, curvature=True)
        return {name: statistics.curvature for name, statistics in calibration.layers.items()}

    longer = {**batch, **{key: F.pad(batch[key], (0, 3)) for key in ("input_ids", "attention_mask")}}
    for name, expected in factors(batch).items():
        found = factors(longer)[name]
        assert found.scale == pytest.approx(expected.scale, rel=1e-3)
        close(found.rows, expected.rows, rtol=1e-3)
        close(found.columns, expected.columns, rtol=1e-3)


def exact_fisher(model: nn.Module, weight: Tensor, batch) -> Tensor:
    gradients = [torch.autograd.grad(batch_loss(model, row), [weight])[0].flatten() for row in rows_of(batch)]
    return torch.stack([torch.outer(g, g) for g in gradients]).mean(0)


@pytest.mark.parametrize("case", ["one-row", "constant-inputs"])
def test_exact_where_the_fisher_matrix_is_a_kronecker_product(case):
    torch.manual_seed(0)
    inputs, targets = classified(1 if case == "one-row" else 6)
    inputs = inputs[:1].expand(len(targets), -1)
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    found = check_model(model, (inputs, targets), [(inputs, targets)])["0"]
    close(found.scale * torch.kron(found.rows, found.columns), exact_fisher(model, model[0].weight, (inputs, targets)))


def test_exact_hessian_of_least_squares():
    """For 1/2 (y - r)^2 with residuals r of one size, E g g' E x x' is the Hessian itself times that size squared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1, bias=False)).eval()
    inputs = classified(9)[0]
    residuals = torch.randint(0, 2, (9, 1)) * 2.0 - 1
    targets = model(inputs).detach() - residuals
    calibration = calibrate(
        model,
        [(inputs, targets)],
        find_layers(model),
        lambda m, batch: 0.5 * (m(batch[0]) - batch[1]).square().mean(),
        gradients=True,
        curvature=True,
    )
    found = calibration.layers["0"]
    close(found.curvature.scale * found.curvature.columns, inputs.T @ inputs / 9)
    error = torch.randn(1, 6)

    def loss(weight):
        return 0.5 * (inputs @ weight.T - targets).square().mean().item()

    change = loss(model[0].weight + error) - loss(model[0].weight)
    first_order = (found.gradient * error).sum().item()
    assert first_order + second_order_change(error, found.curvature) == pytest.approx(change, rel=1e-4)


class Tied(nn.Module):
    """A weight that is looked up, and multiplied twice; and a layer that runs twice."""

    def __init__(self, reads: bool = True, looks: bool = True):
        super().__init__()
        self.embedding, self.twice, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.reads, self.looks = reads, looks

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(input=ids)
        hidden = hidden if self.looks else torch.sin(torch.arange(4.0) + ids[:, None])
        hidden = torch.tanh(self.twice(input=torch.tanh(self.twice(hidden))))
        return self.head(hidden) if self.reads else hidden


TOKENS = torch.tensor([0, 3, 5, 3]), torch.tensor([1, 1, 2, 0])


def test_a_layer_that_runs_twice():
    check_model(Tied().eval(), TOKENS, [TOKENS], skip=("embedding",))


@pytest.mark.parametrize("use", ["reads", "looks"])
def test_a_tied_weight_used_one_way(use):
    torch.manual_seed(0)
    check_model(
        Tied(**{"reads": use == "reads", "looks": use == "looks"}).eval(), TOKENS, [TOKENS], skip=("embedding",)
    )


@pytest.mark.parametrize("largest", [4096, 5], ids=["full", "diagonal"])
def test_a_tied_weight_keeps_the_partial_traces(largest, monkeypatch):
    monkeypatch.setattr(module_under_test, "LARGEST_FACTOR", largest)
    torch.manual_seed(0)
    model = Tied().eval()
    layer = find_layers(model)[0]
    assert layer.tied == ("head",)
    statistics = calibrate(model, [TOKENS], [layer], batch_loss, curvature=True).layers["embedding"]
    uses = uses_of(model, layer, TOKENS)
    hessian = 0
    for kind in ("Embedding", "Linear"):
        rows, columns, per_row = reference(layer, [use for use in uses if use[0] == kind], 4)
        hessian = hessian + per_row * torch.kron(rows, columns[0])
    found = statistics.curvature
    assert found.scale == pytest.approx(hessian.diagonal().mean().item(), rel=1e-4)
    rows = torch.einsum("kili->kl", hessian.view(9, 4, 9, 4))
    columns = torch.einsum("kikj->ij", hessian.view(9, 4, 9, 4))
    close(found.rows, (rows.diagonal() if largest == 5 else rows) / rows.diagonal().mean())
    close(found.columns, columns / columns.diagonal().mean())


@pytest.mark.parametrize("largest", [5, 7], ids=["both-long", "one-long"])
def test_a_long_side_keeps_its_diagonal(largest, monkeypatch):
    monkeypatch.setattr(module_under_test, "LARGEST_FACTOR", largest)
    batch = classified(8)
    found = check_model(network(), batch, [batch])
    shapes = {name: (factors.rows.ndim, factors.columns.ndim) for name, factors in found.items()}
    assert shapes == (
        {"0": (1, 1), "2": (2, 1), "4": (2, 2)} if largest == 5 else {"0": (1, 2), "2": (2, 1), "4": (2, 2)}
    )
    torch.manual_seed(0)
    for options in ({}, {"groups": 2}):
        model = Pixels(nn.Conv2d(4, 4, 3, **options)).eval()
        batch = images(channels=4)
        found = check_model(model, batch, [batch], skip=("conv",) if options else ())["conv"]
        assert found.columns.shape == (36 // options.get("groups", 1),)
        assert found.columns.mean().item() == pytest.approx(1, rel=1e-5)


class Partial(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle, self.ignored, self.frozen = (nn.Linear(6, 3) for _ in range(4))
        self.conv = nn.Conv2d(1, 2, 3, groups=1)

    def forward(self, x):
        with torch.no_grad():
            self.frozen(x)
        return self.used(x) + 0 * self.ignored(x)


def test_zero_where_the_loss_does_not_reach():
    model = Partial().eval()
    calibration = calibrate(model, [classified(6)], find_layers(model), batch_loss, gradients=True, curvature=True)
    for name in ("idle", "ignored", "frozen", "conv"):
        found = calibration.layers[name].curvature
        assert found.scale == 0 and not found.rows.any() and not found.columns.any()
        assert not calibration.layers[name].gradient.any()
        assert second_order_change(torch.ones_like(calibration.layers[name].gradient), found) == 0
    assert calibration.layers["used"].curvature.scale > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    inputs, targets = classified(16)
    model, exact = network().to(dtype), network()
    found = calibrate(
        model, [(inputs.to(dtype), targets)], find_layers(model), batch_loss, gradients=True, curvature=True
    )
    expected = calibrate(exact, [(inputs, targets)], find_layers(exact), batch_loss, gradients=True, curvature=True)
    for name, statistics in found.layers.items():
        curvature, wanted = statistics.curvature, expected.layers[name].curvature
        assert {curvature.rows.dtype, curvature.columns.dtype, statistics.gradient.dtype} == {torch.float32}
        assert curvature.scale == pytest.approx(wanted.scale, rel=0.05)
        close(curvature.rows, wanted.rows, rtol=0.05)
        close(curvature.columns, wanted.columns, rtol=0.05)


class Unit(nn.Module):
    """One layer of each kind, whose inputs and gradients are multiplied by powers of two; its outputs stay the same."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.factor = 2.0**inputs
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.grouped = nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.linear = nn.Linear(6, 5, bias=False)
        self.embedding = nn.Embedding(5, 5)
        self.head = nn.Linear(5, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, images):
        for layer in (self.conv, self.grouped):
            images = torch.tanh(layer(images * self.factor) / self.factor)
        hidden = torch.tanh(self.linear(images.mean((2, 3)) * self.factor) / self.factor)
        hidden = hidden + self.embedding(torch.arange(len(images)) % 3) * self.factor / self.factor
        return self.head(hidden * self.factor) / self.factor


def factors_of(inputs: int = 0, loss: int = 0, first_loss: int | None = None) -> dict:
    """Statistics by layer, of two batches of a model with factors of two to these powers."""
    model = Unit(inputs).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 2, 5, 5, generator=generator), torch.arange(4) % 5) for _ in range(2)]
    powers = iter([loss if first_loss is None else first_loss, loss])
    layers = find_layers(model)
    return calibrate(model, batches, layers, lambda m, b: batch_loss(m, b) * 2.0 ** next(powers), curvature=True).layers


def assert_same_factors(found: KroneckerFactors, expected: KroneckerFactors) -> None:
    assert torch.equal(found.rows, expected.rows) and torch.equal(found.columns, expected.columns)


@pytest.mark.parametrize("power", [-80, -60, -34, -20, 20, 34, 60, 90], ids="2^{}".format)
def test_sizes_that_squares_in_float32_would_lose(power):
    """Of gradients of 1e-25 to 1e27, and of inputs: the same factors to the bit, and the scale that belongs to them."""
    plain = factors_of()
    for name, statistics in factors_of(loss=power).items():
        assert_same_factors(statistics.curvature, plain[name].curvature)
        assert statistics.curvature.scale == plain[name].curvature.scale * 4.0**power
    for name, statistics in factors_of(inputs=power).items():  # gradients are as much smaller as inputs are larger
        assert_same_factors(statistics.curvature, plain[name].curvature)
        assert statistics.curvature.scale == plain[name].curvature.scale
        if statistics.curvature.mean_input is not None:
            assert torch.equal(statistics.curvature.mean_input / 2.0**power, plain[name].curvature.mean_input)


@pytest.mark.parametrize(("first", "then"), [(-90, 0), (0, -90), (-90, -60), (90, 0), (0, 90), (-60, 60)], ids=str)
def test_batches_of_different_sizes(first, then):
    """Each half has its own factors; in the whole the larger gradients decide on the rows, inputs are as before."""
    plain, found = factors_of(), factors_of(first_loss=first, loss=then)
    larger = int(then > first)
    for name, statistics in found.items():
        for index, power in enumerate((first, then)):
            assert_same_factors(statistics.halves[index], plain[name].halves[index])
            assert statistics.halves[index].scale == plain[name].halves[index].scale * 4.0**power
        assert statistics.curvature.is_finite
        if name in ("conv", "linear"):
            assert torch.equal(statistics.curvature.rows, plain[name].halves[larger].rows)
            assert torch.equal(statistics.curvature.columns, plain[name].curvature.columns)
            # Half of the rows have the larger gradients, and so have half of the positions.
            assert statistics.curvature.scale == pytest.approx(statistics.halves[larger].scale / 2, rel=0.6)


@pytest.mark.parametrize("power", [-126, -135, 100], ids="2^{}".format)
def test_at_the_ends_of_float32_the_factors_are_positive_definite(power):
    for statistics in factors_of(loss=power).values():
        factors = statistics.curvature.damped(0.03)
        assert factors.is_finite
        for factor in (factors.rows, factors.columns):
            assert (factor > 0).all() if factor.ndim == 1 else torch.linalg.eigvalsh(factor.double())[0] > 0.02


def test_a_group_that_sees_next_to_nothing_beside_others():
    """Its inputs' squares are no numbers of float32 in the unit of the others; nothing else goes wrong for it."""
    model = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2, bias=False), nn.Flatten(), nn.Linear(16, 3)).eval()
    images = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for small in (0.0, 1e-20, 1e-30):
        batch = images * torch.tensor([1.0, 1.0, small, small]).view(4, 1, 1), torch.arange(8) % 3
        found = calibrate(model, [batch], find_layers(model), batch_loss, curvature=True).layers["0"].curvature
        assert found.is_finite and found.scale > 0
        assert found.rows[:2].mean().item() == pytest.approx(2, rel=1e-5) and not found.rows[2:].gt(1e-30).any()
        assert found.columns.diagonal().mean().item() == pytest.approx(1, rel=1e-5)


def test_what_leaves_float32_is_named():
    """Only a model in float64 has such gradients where its loss is finite."""
    model = network().double()
    inputs, targets = classified(8)
    message = r"second moments of layer '0' overflow: .* too large for float32 \(3e38\)"
    with pytest.raises(CalibrationError, match=message):
        calibrate(
            model,
            [(inputs.double(), targets)],
            find_layers(model),
            lambda m, b: F.cross_entropy(m(b[0]), b[1]) * 1e60,
            curvature=True,
        )


@pytest.mark.parametrize("power", [-100, -40, 40, 60], ids="2^{}".format)
def test_tiny_and_huge_errors(power):
    factors = KroneckerFactors(some_metric(4, False), some_metric(5, False, 1), 0.3)
    error = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    change = second_order_change(error, factors)
    assert second_order_change(error * 2.0**power, factors) == pytest.approx(change * 4.0**power, rel=1e-6)


def test_sums_of_processes_are_added(monkeypatch):
    """Two processes with half of the rows each give what one gives that has them all."""
    batch, model = classified(8), network()
    layers = find_layers(model)
    whole = calibrate(model, [batch], layers, batch_loss, curvature=True)
    halves = []
    for part in (slice(0, 5), slice(5, 8)):
        with monkeypatch.context() as patch:
            patch.setattr(module_under_test.CurvatureSums, "factors", lambda sums, *rows: sums)
            patch.setattr(module_under_test.CurvatureSums, "is_finite", True, raising=False)
            patch.setattr("hf_lossless.calibration.statistics.num_examples", lambda rows: len(rows[1]))
            halves.append(calibrate(model, [(batch[0][part], batch[1][part])], layers, batch_loss, curvature=True))
    for name, statistics in whole.layers.items():
        first, second = (half.layers[name].curvature for half in halves)
        shares = [5 / 8, 3 / 8]  # a process back-propagates its rows' share of the whole
        for sums, share in zip((first, second), shares, strict=True):
            sums.products.rows *= share**2
        first.num_examples = 8
        others = iter(second.products.parts)
        monkeypatch.setattr(
            module_under_test, "sum_over_processes", lambda values, others=others: values + next(others)
        )
        found = first.over_processes().factors()
        assert found.scale == pytest.approx(statistics.curvature.scale, rel=1e-4)
        close(found.rows, statistics.curvature.rows)
        close(found.columns, statistics.curvature.columns)


def test_hooks_go_and_the_graph_with_them():
    """No hook stays behind, and one batch's inputs do not outlive it."""
    model, alive = network(), []

    def loss(model, batch):
        gc.collect()
        assert not [reference for reference in alive if reference() is not None]
        handle = model[2].register_forward_pre_hook(lambda module, arguments: alive.append(weakref.ref(arguments[0])))
        value = batch_loss(model, batch)
        handle.remove()
        return value

    calibrate(model, [classified(4)] * 3, find_layers(model), loss, gradients=True, curvature=True)
    assert len(alive) == 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_sums_have_a_use_for_every_module():
    model = Tied()
    layer = find_layers(model)[0]
    sums = CurvatureSums(layer, modules_of(model, layer), 1)
    assert sums.lookups.rows.shape == (9,) and sums.products.rows.shape == (9, 9)


def some_metric(size: int, diagonal: bool, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if diagonal:
        return torch.rand(size, generator=generator)
    values = torch.randn(size, 2 * size, generator=generator)
    return values @ values.T / size


@pytest.mark.parametrize("rows", [False, True], ids=["full-rows", "diagonal-rows"])
@pytest.mark.parametrize("columns", [False, True], ids=["full-columns", "diagonal-columns"])
def test_second_order_change_is_the_quadratic_form(rows, columns):
    factors = KroneckerFactors(some_metric(4, rows), some_metric(5, columns, 1), 0.3)
    error = torch.randn(4, 5)
    kept = error.clone()
    hessian = 0.3 * torch.kron(dense(factors.rows), dense(factors.columns))
    vector = error.double().flatten()
    expected = 0.5 * vector @ hessian @ vector
    assert second_order_change(error, factors) == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(error, kept)
    assert second_order_change(error.bfloat16(), factors) == pytest.approx(expected.item(), rel=0.05, abs=0.05)


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_damping_adds_to_the_diagonal(diagonal):
    metric = some_metric(6, diagonal)
    factors = KroneckerFactors(metric, some_metric(4, not diagonal), 0.3)
    damped = factors.damped(0.5)
    added = 0.5 * dense(metric).diagonal().mean() * torch.eye(6).double()
    torch.testing.assert_close(dense(damped.rows), dense(metric) + added, rtol=1e-6, atol=1e-6)
    assert damped.scale == factors.scale and torch.equal(metric, some_metric(6, diagonal))


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_nothing_damped_is_the_identity(diagonal):
    """A layer that the loss does not reach: any factorisation is as good as any other, and costs nothing."""
    metric = torch.zeros(3) if diagonal else torch.zeros(3, 3)
    damped = KroneckerFactors(metric, metric, 0.0).damped(0.1)
    assert torch.equal(dense(damped.rows), torch.eye(3).double()) and damped.rows.shape == metric.shape
    assert second_order_change(torch.ones(3, 3), damped) == 0


def test_a_damped_singular_metric_is_positive_definite():
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    damped = KroneckerFactors(torch.outer(direction, direction), torch.ones(2), 1.0).damped(1e-2)
    assert torch.linalg.eigvalsh(damped.rows).min() > 0


def test_halves_are_the_even_and_the_odd_batches_alone():
    model = Partial().eval()
    batches = [classified(rows) for rows in (3, 5, 2, 4, 6)]
    layers = find_layers(model)
    calibration = calibrate(model, batches, layers, batch_loss, curvature=True)
    for start in (0, 1):
        alone = calibrate(model, batches[start::2], layers, batch_loss, curvature=True)
        for name, statistics in calibration.layers.items():
            expected, found = alone.layers[name].curvature, statistics.halves[start]
            assert found.scale == pytest.approx(expected.scale, rel=1e-5)
            close(found.rows, expected.rows)
            close(found.columns, expected.columns)
    assert all(layer.halves is None for layer in calibrate(model, batches, layers, batch_loss).layers.values())
    one = calibrate(model, batches[:1], layers, batch_loss, curvature=True)
    assert all(layer.halves is None and layer.curvature is not None for layer in one.layers.values())
    assert all(layer.halves is None for layer in calibration.without_tensors().layers.values())


def mean_inputs(model: nn.Module, batches: list, **settings) -> dict[str, Tensor | None]:
    calibration = calibrate(model, batches, find_layers(model), batch_loss, curvature=True, **settings)
    return {name: statistics.curvature.mean_input for name, statistics in calibration.layers.items()}


@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "gpt2"])
def test_mean_inputs(name):
    """Of all positions that have a part in the loss, in the unit of the inputs; none of lookups and shared weights."""
    tiny = TINY_MODELS[name]
    model, batch = tiny.build(), tiny.batch(rows=4)
    found = mean_inputs(model, [batch])
    for layer in find_layers(model):
        if layer.kind == "embedding":  # looked up, and perhaps multiplied as well
            assert found[layer.name] is None
            continue
        vectors = []
        for kind, inputs, gradient in uses_of(model, layer, batch):
            if kind == "Conv2d":
                module = layer.module
                patches = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
                vectors.append(patches[0].T[gradient[0].flatten(1).T.any(1)])
            else:
                flat = inputs.reshape(-1, inputs.shape[-1])
                vectors.append(flat[gradient.reshape(-1, gradient.shape[-1]).any(1)])
        close(found[layer.name], torch.cat(vectors).mean(0), rtol=1e-3)
        assert found[layer.name].dtype == torch.float32


def test_the_mean_input_of_each_half():
    """The batches do not matter for the whole; the even and the odd ones have their own."""
    inputs, targets = classified(9)
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    batches = list(zip(inputs.split(2), targets.split(2), strict=True))
    found = calibrate(model, batches, find_layers(model), batch_loss, curvature=True).layers["0"]
    close(found.curvature.mean_input, inputs.mean(0))
    halves = [torch.cat([batch[0] for batch in batches[start::2]]).mean(0) for start in (0, 1)]
    for half, expected in zip(found.halves, halves, strict=True):
        close(half.mean_input, expected)


def test_mean_inputs_of_grouped_convolutions_and_unreached_layers():
    torch.manual_seed(0)
    model = Pixels(nn.Conv2d(4, 8, 3, groups=2), 8).eval()
    found = mean_inputs(model, [images(channels=4)])
    assert found["conv"] is None and found["head"] is not None
    idle = mean_inputs(Partial().eval(), [classified(6)])
    for name in ("idle", "ignored", "frozen", "conv"):
        assert not idle[name].any() and torch.isfinite(idle[name]).all()
    assert mean_inputs(Tied().eval(), [TOKENS])["embedding"] is None


def test_the_mean_input_is_kept_when_damped():
    factors = KroneckerFactors(torch.ones(2), torch.ones(3), 1.0, torch.arange(3.0))
    assert torch.equal(factors.damped(0.1).mean_input, torch.arange(3.0))
