"""Noise goes where it should and leaves nothing behind."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lossless.calibration.perturbation import (
    input_noise,
    loss_change,
    mean_loss_share,
    one_sided_noise,
    seeded_number,
    weight_noise,
)
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import Layer, find_layers

MODULES = {
    "linear": lambda: nn.Linear(5, 4),
    "conv1d": lambda: Conv1D(4, 5),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv2d-channels-last": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "embedding": lambda: nn.Embedding(7, 3),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def only_layer(module: nn.Module) -> Layer:
    return find_layers(nn.ModuleDict({"layer": module}))[0]


@pytest.mark.parametrize("kind", MODULES)
@DTYPES
def test_weight_noise_is_added_and_taken_back_exactly(kind, dtype):
    torch.manual_seed(0)
    module = MODULES[kind]().to(dtype)
    layer = only_layer(module)
    before, identity, address = module.weight.detach().clone(), module.weight, module.weight.data_ptr()
    noise = torch.randn(layer.matrix.shape)
    expected = (layer.matrix.detach().float() + noise).to(dtype)
    with weight_noise(layer, noise):
        assert torch.equal(layer.matrix, expected)
        # The module itself computes with it, in its own layout.
        assert module.weight is identity and module.weight.data_ptr() == address
        assert not torch.equal(module.weight, before)
        assert module.weight.stride() == before.stride()
    assert torch.equal(module.weight, before)
    assert module.weight.stride() == before.stride() and module.weight.requires_grad


def test_conv1d_noise_is_transposed():
    module = Conv1D(2, 3)
    noise = torch.arange(6.0).view(2, 3)  # [out, in]
    before = module.weight.detach().clone()
    with weight_noise(only_layer(module), noise):
        torch.testing.assert_close(module.weight - before, noise.T, rtol=0, atol=1e-6)


def test_conv2d_noise_has_the_kernels_order():
    module = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    noise = torch.arange(24.0).view(3, 8)
    before = module.weight.detach().clone()
    with weight_noise(only_layer(module), noise):
        torch.testing.assert_close(module.weight - before, noise.view(3, 2, 2, 2), rtol=0, atol=1e-5)


def test_an_error_inside_puts_the_weight_back():
    module = nn.Linear(3, 3)
    before = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), weight_noise(only_layer(module), torch.ones(3, 3)):
        raise RuntimeError("stop")
    assert torch.equal(module.weight, before)


class Tied(nn.Module):
    """A tied pair, a module with two names, a layer called by keyword."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.twice = nn.Linear(4, 4)
        self.again = self.twice
        self.other = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.other(self.again(self.twice(input=self.embedding(ids)))))


def inputs_of(model: nn.Module, ids: Tensor) -> dict[str, list[Tensor]]:
    """What every module computes with, seen from inside its forward."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        getattr(model, name).register_forward_hook(
            lambda module, arguments, keywords, output, name=name: seen.setdefault(name, []).append(
                arguments[0] if arguments else keywords["input"]
            ),
            with_kwargs=True,
        )
        for name in ("embedding", "twice", "other", "head")
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_input_noise_hits_one_layer_only():
    model, ids = Tied(), torch.tensor([1, 4])
    layers = {layer.name: layer for layer in find_layers(model)}
    clean, outputs = inputs_of(model, ids), model(ids)
    with input_noise(model, layers["other"], lambda values: torch.ones_like(values)):
        noisy = inputs_of(model, ids)
    torch.testing.assert_close(noisy["other"][0], clean["other"][0] + 1)
    assert torch.equal(noisy["twice"][0], clean["twice"][0]) and torch.equal(noisy["twice"][1], clean["twice"][1])
    torch.testing.assert_close(noisy["head"][0], model.other(clean["other"][0] + 1))
    assert torch.equal(model(ids), outputs)
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_input_noise_hits_tied_layers_but_no_token_ids():
    model, ids = Tied(), torch.tensor([1, 4])
    embedding = find_layers(model)[0]
    assert (embedding.name, embedding.tied) == ("embedding", ("head",))
    clean = inputs_of(model, ids)
    with input_noise(model, embedding, lambda values: torch.ones_like(values)):
        noisy = inputs_of(model, ids)
    assert torch.equal(noisy["embedding"][0], ids)
    torch.testing.assert_close(noisy["head"][0], clean["head"][0] + 1)
    assert torch.equal(noisy["other"][0], clean["other"][0])


@torch.no_grad()
def test_a_module_with_two_names_gets_its_noise_once_a_call():
    model, ids = Tied(), torch.tensor([1, 4])
    twice = find_layers(model)[1]
    assert (twice.name, twice.tied) == ("twice", ("again",))
    drawn = []

    def draw(values: Tensor) -> Tensor:
        drawn.append(values.shape)
        return torch.ones_like(values)

    clean = inputs_of(model, ids)
    with input_noise(model, twice, draw):
        noisy = inputs_of(model, ids)
    assert len(drawn) == 2  # it runs twice
    torch.testing.assert_close(noisy["twice"][0], clean["twice"][0] + 1)  # called by keyword
    torch.testing.assert_close(noisy["twice"][1], model.twice(clean["twice"][0] + 1) + 1)


def test_an_error_inside_removes_the_hooks():
    model = Tied()
    with pytest.raises(RuntimeError, match="stop"), input_noise(model, find_layers(model)[0], torch.ones_like):
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_sided_noise(sign):
    noise = one_sided_noise(torch.Size([400, 500]), sign, torch.Generator().manual_seed(0))
    assert (noise * sign >= 0).all()
    assert noise.abs().mean().item() == pytest.approx((2 / torch.pi) ** 0.5, rel=1e-2)  # of |N(0, 1)|
    assert noise.square().mean().item() == pytest.approx(1, rel=1e-2)


def test_noise_is_that_of_its_seed():
    draws = [one_sided_noise(torch.Size([8]), 1.0, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_seeded_number():
    assert seeded_number(1, 2, 3) == seeded_number(1, 2, 3)
    seeds = {seeded_number(*numbers) for numbers in [(0,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**63, 5), (-1, 7)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**62 for seed in seeds)  # what a torch.Generator takes
    grid = {seeded_number(0, layer, bits) for layer in range(300) for bits in range(17)}
    assert len(grid) == 300 * 17


def test_mean_loss_weighs_batches_by_their_examples():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    inputs, targets = torch.randn(10, 4), torch.randint(0, 3, (10,))
    batches = [(inputs[:7], targets[:7]), (inputs[7:9], targets[7:9]), (inputs[9:], targets[9:])]
    seen = []
    loss = mean_loss_share(model, batches, batch_loss, seen.append)
    assert loss == pytest.approx(batch_loss(model, (inputs, targets)).item(), rel=1e-6)
    assert seen == [0, 1, 2]


def test_mean_loss_needs_no_gradient():
    model, modes = nn.Linear(4, 3), []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return batch_loss(model, batch)

    mean_loss_share(model, [(torch.randn(2, 4), torch.tensor([0, 1]))], loss)
    assert modes == [False] and torch.is_grad_enabled()


def test_a_loss_that_is_not_finite():
    batches = [(torch.zeros(2, 4), torch.tensor([0, 1])), (torch.full((2, 4), torch.inf), torch.tensor([0, 1]))]
    assert math.isnan(mean_loss_share(nn.Linear(4, 3), batches, batch_loss))


def changed_batches(sizes: tuple[int, ...] = (7, 2, 1)) -> tuple[nn.Module, list, list[float]]:
    """A model, its batches, and the losses before each row of its weight was doubled."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    batches = [(torch.randn(rows, 4), torch.randint(0, 3, (rows,))) for rows in sizes]
    before = [batch_loss(model, batch).item() for batch in batches]
    model.weight.data *= 2
    return model, batches, before


def test_loss_change_weighs_batches_by_their_examples():
    model, batches, before = changed_batches()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    after = batch_loss(model, (inputs, targets)).item()
    found = loss_change(model, batches, batch_loss, before)
    assert found.mean == pytest.approx(after - (7 * before[0] + 2 * before[1] + before[2]) / 10, rel=1e-5)
    assert found.mean == pytest.approx(
        mean_loss_share(model, batches, batch_loss) - sum(map(math.prod, zip(before, (0.7, 0.2, 0.1), strict=True)))
    )


def test_the_standard_error_of_a_loss_change():
    """Of equal batches it is that of a mean of so many numbers; it shrinks with them."""
    model, batches, before = changed_batches((3,) * 8)
    changes = torch.tensor([batch_loss(model, batch).item() - old for batch, old in zip(batches, before, strict=True)])
    found = loss_change(model, batches, batch_loss, before)
    assert found.mean == pytest.approx(changes.mean().item(), rel=1e-5)
    assert found.standard_error == pytest.approx((changes.std() / 8**0.5).item(), rel=1e-5)
    more = loss_change(model, batches * 4, batch_loss, before * 4)
    assert more.standard_error == pytest.approx(found.standard_error / 2, rel=0.1)
    # Of unequal batches: sum of w^2 (change - mean)^2, and n / (n - 1) for the mean's own part in it
    model, batches, before = changed_batches()
    changes = torch.tensor([batch_loss(model, batch).item() - old for batch, old in zip(batches, before, strict=True)])
    weights = torch.tensor([0.7, 0.2, 0.1])
    expected = ((weights * (changes - weights @ changes)).square().sum() * 3 / 2).sqrt().item()
    assert loss_change(model, batches, batch_loss, before).standard_error == pytest.approx(expected, rel=1e-4)


def test_no_loss_change():
    model, batches, _ = changed_batches()
    now = [batch_loss(model, batch).item() for batch in batches]
    assert loss_change(model, batches, batch_loss, now) == (0, 0)
    [alone], one = now[:1], batches[:1]
    assert loss_change(model, one, batch_loss, [alone - 2]) == (pytest.approx(2), 0)


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_a_loss_change_that_is_not_finite(value):
    model, batches, before = changed_batches()
    batches[1] = (batches[1][0] * value, batches[1][1])
    found = loss_change(model, batches, batch_loss, before)
    assert not math.isfinite(found.mean) and not math.isfinite(found.standard_error)
    assert not found.mean <= 1e9 + 2 * found.standard_error  # it is no change within any limits


def test_loss_change_needs_no_gradient():
    modes = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return batch_loss(model, batch)

    model, batches, before = changed_batches()
    loss_change(model, batches, loss, before)
    assert modes == [False] * 3 and torch.is_grad_enabled()
