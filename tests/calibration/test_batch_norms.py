"""Batch norms that follow compressed layers, against the moments written out batch by batch."""

import copy

import pytest
import torch
from round_trips import assert_same_model
from tiny_models import TINY_MODELS
from torch import Tensor, nn

from hf_lossless import LosslessCompressionConfig, compress
from hf_lossless.calibration.batch_norms import LARGEST_CHANGE, batch_norms, follow, input_moments
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.modules.base import CompressedModule

CHANNELS = 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settled(model: nn.Module) -> nn.Module:
    """With running statistics, weights and biases of its own in every norm."""
    for index, norm in enumerate(module for module in model.modules() if hasattr(module, "running_mean")):
        if norm.running_mean is not None:
            norm.running_mean.copy_(random(len(norm.running_mean), seed=20 + index))
            norm.running_var.copy_(0.5 + random(len(norm.running_var), seed=40 + index).square())
    return model.eval()


def network() -> nn.Sequential:
    """Two norms in sequence."""
    torch.manual_seed(0)
    first, second = nn.Linear(7, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
    return settled(
        nn.Sequential(
            first, nn.BatchNorm1d(CHANNELS), nn.ReLU(), second, nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 3)
        )
    )


def batches_of(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(random(rows, 7, seed=rows) + 0.5, torch.arange(rows) % 3) for rows in sizes]


def coarse(model: nn.Module) -> nn.Module:
    """A twin with its weights rounded to halves."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.copy_((2 * module.weight).round() / 2)
    return twin


def followed(model: nn.Module, compressed: nn.Module, batches: list, loss=batch_loss) -> nn.Module:
    follow(compressed, batches, loss, input_moments(model, batches, loss))
    return compressed


def corrected(norm: nn.Module, then: list[Tensor], now: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Running mean and variance by the formula, from all inputs [rows, channels] before and after."""
    before, after = torch.cat(then).double(), torch.cat(now).double()
    ratio = after.var(0, correction=0) / before.var(0, correction=0)
    ratio = ratio.clamp(1 / LARGEST_CHANGE, LARGEST_CHANGE)
    return norm.running_mean + (after.mean(0) - before.mean(0)).float(), norm.running_var * ratio.float()


@torch.no_grad()
def test_one_norm_by_the_formula():
    model, batches = network(), batches_of(9, 4, 6)
    compressed = followed(model, coarse(model), batches)
    inputs = [batch[0] for batch in batches]
    mean, variance = corrected(model[1], [model[0](x) for x in inputs], [compressed[0](x) for x in inputs])
    torch.testing.assert_close(compressed[1].running_mean, mean)
    torch.testing.assert_close(compressed[1].running_var, variance)
    assert not torch.allclose(mean, model[1].running_mean, atol=1e-3)
    assert torch.equal(compressed[1].num_batches_tracked, model[1].num_batches_tracked)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(11,), (9, 4, 6)], ids=["one-batch", "three"])
def test_a_norm_sees_what_the_one_before_it_leaves(sizes):
    """In each batch with the statistics that the batches up to it gave."""
    model, batches = network(), batches_of(*sizes)
    twin = coarse(model)
    rounded, expected = copy.deepcopy(twin), copy.deepcopy(twin)
    inputs = [batch[0] for batch in batches]
    then = [[model[:place](x) for x in inputs] for place in (1, 4)]
    now: list[list[Tensor]] = [[], []]
    for index, x in enumerate(inputs, 1):
        for norm, place in enumerate((1, 4)):
            now[norm].append(expected[:place](x))
            mean, variance = corrected(rounded[place], then[norm][:index], now[norm])
            expected[place].running_mean, expected[place].running_var = mean, variance
    followed(model, twin, batches)
    for place in (1, 4):
        torch.testing.assert_close(twin[place].running_mean, expected[place].running_mean)
        torch.testing.assert_close(twin[place].running_var, expected[place].running_var)


def assert_same_statistics(found: nn.Module, expected: nn.Module) -> None:
    norms = batch_norms(expected)
    assert norms
    for name, norm in norms.items():
        own = found.get_submodule(name)
        torch.testing.assert_close(own.running_mean, norm.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own.running_var, norm.running_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["network", "resnet", "mobilenet-v2", "efficientnet"])
def test_unchanged_layers_leave_the_statistics_as_they_are(name):
    if name == "network":
        model, batches = network(), batches_of(9, 4, 6)
    else:
        tiny = TINY_MODELS[name]
        model, batches = settled(tiny.build()), [tiny.batch(4), tiny.batch(3, seed=1)]
    twin = followed(model, copy.deepcopy(model), batches)
    assert_same_statistics(twin, model)
    assert not any(module._forward_pre_hooks for module in [*model.modules(), *twin.modules()])


def constants(values: Tensor, norm: nn.Module) -> nn.Sequential:
    """A layer whose first channel is constant, at the first of `values`."""
    model = nn.Sequential(nn.Linear(7, CHANNELS), copy.deepcopy(norm), nn.Linear(CHANNELS, 3))
    torch.nn.init.ones_(model[0].weight)
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias.copy_(values)
    return model.eval()


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.7, 1000.3], ids=str)
def test_a_constant_channel_has_no_ratio(constant):
    """Its mean follows, its variance stays: what is left of it in float64 is rounding."""
    batches, norm = batches_of(9, 4, 6), settled(nn.BatchNorm1d(CHANNELS))
    before = constants(torch.full((CHANNELS,), constant), norm)
    after = constants(torch.full((CHANNELS,), constant / 3 + 0.07), norm)
    followed(before, after, batches)
    shift = constant / 3 + 0.07 - constant
    assert after[1].running_mean[0].item() == pytest.approx(norm.running_mean[0].item() + shift, rel=1e-4, abs=1e-6)
    assert after[1].running_var[0].item() == pytest.approx(norm.running_var[0].item(), rel=1e-4)
    torch.testing.assert_close(after[1].running_var[1:], norm.running_var[1:], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("before", "after", "rows"),
    [(-278.8816223144531, 40.38930130004883, 1593), (0.01837167702615261, -0.07436196202823257, 1985), (3.36, -0.5, 7)],
    ids=str,
)
def test_the_rounding_of_sums_is_no_variance(before, after, rows):
    norm, batch = nn.Sequential(nn.BatchNorm1d(1)).eval(), torch.ones(rows, 1)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum()

    moments = input_moments(norm, [before * batch, before * batch[:3]], loss)
    follow(norm, [after * batch, after * batch[:3]], loss, moments)
    assert norm[0].running_mean.item() == pytest.approx(after - before, rel=1e-5)
    assert norm[0].running_var.item() == pytest.approx(1.0)


@pytest.mark.parametrize("factor", [0.0, 1e-3, 1e3], ids=str)
def test_a_variance_changes_only_so_far(factor):
    model, batches = network(), batches_of(9, 4)
    twin = copy.deepcopy(model)
    twin[0].weight.data *= factor
    followed(model, twin, batches)
    ratio = LARGEST_CHANGE if factor > 1 else 1 / LARGEST_CHANGE
    torch.testing.assert_close(twin[1].running_var, model[1].running_var * ratio)
    assert torch.isfinite(twin(batches[0][0])).all()


class Twice(nn.Module):
    """A norm that runs on two things in every batch, after another that runs once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, CHANNELS), nn.Linear(7, CHANNELS)
        self.norm, self.head = nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.first(inputs))) + self.norm(self.second(inputs)))


@torch.no_grad()
def test_a_norm_that_runs_twice():
    """Both uses in its moments."""
    model, batches = settled(Twice()), batches_of(9, 4)
    twin = followed(model, coarse(model), batches)
    inputs = torch.cat([batch[0] for batch in batches])
    uses = [[one.first(inputs), one.second(inputs)] for one in (model, twin)]
    mean, variance = corrected(model.norm, *uses)
    torch.testing.assert_close(twin.norm.running_mean, mean)
    torch.testing.assert_close(twin.norm.running_var, variance)
    assert_same_statistics(followed(model, copy.deepcopy(model), batches), model)


@pytest.mark.parametrize("kind", ["no-statistics", "instance", "layer", "group"])
def test_norms_without_running_statistics_are_left_alone(kind):
    norm = {
        "no-statistics": nn.BatchNorm2d(4, track_running_stats=False),
        "instance": nn.InstanceNorm2d(4, affine=True),
        "layer": nn.LayerNorm([4, 6, 6]),
        "group": nn.GroupNorm(2, 4),
    }[kind]
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm, nn.Flatten(), nn.Linear(144, 3)).eval()
    batches = [(random(6, 2, 6, 6), torch.arange(6) % 3)]
    assert batch_norms(model) == {} == input_moments(model, batches, batch_loss)
    state = copy.deepcopy(model.state_dict())
    followed(model, model, batches)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    compress(model, batches, LosslessCompressionConfig(loss_budget=1.0, bits=(4, 8)))


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4), (6, 4, 9)),
        (nn.BatchNorm2d(4, affine=False), (6, 4, 3, 5)),
        (nn.BatchNorm3d(4, momentum=None), (6, 4, 3, 5, 2)),
    ],
    ids=["rows", "sequence", "images", "volumes"],
)
@torch.no_grad()
def test_channels_are_the_second_axis(norm, shape):
    model, twin = nn.Sequential(norm).eval(), nn.Sequential(copy.deepcopy(norm)).eval()
    values, scaled = random(*shape), 1.5 * random(*shape) + 3

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum()

    follow(twin, [scaled], loss, input_moments(model, [values], loss))
    flat = [one.transpose(0, 1).flatten(1).T for one in (values, scaled)]
    mean, variance = corrected(model[0], flat[:1], flat[1:])
    torch.testing.assert_close(twin[0].running_mean, mean)
    torch.testing.assert_close(twin[0].running_var, variance)


def test_the_first_of_the_batches_will_do():
    model, batches = network(), batches_of(9, 4, 6)
    moments = input_moments(model, batches, batch_loss)
    some, all_of_them = coarse(model), coarse(model)
    follow(some, batches[:2], batch_loss, moments)
    follow(all_of_them, batches[:2], batch_loss, input_moments(model, batches[:2], batch_loss))
    assert all(torch.equal(value, some.state_dict()[name]) for name, value in all_of_them.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    model, batches = network(), batches_of(9, 4)
    exact = followed(model, coarse(model), batches)
    halved = network().to(dtype)
    found = followed(halved, coarse(halved), [(inputs.to(dtype), targets) for inputs, targets in batches])
    assert found[1].running_mean.dtype == dtype
    torch.testing.assert_close(found[4].running_mean.float(), exact[4].running_mean, rtol=0.1, atol=0.05)


def test_an_error_removes_the_hooks():
    model = network()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        model(batch[0])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        input_moments(model, batches_of(4), loss)
    assert not any(module._forward_pre_hooks for module in model.modules())


# In compress().


def resnet() -> tuple[nn.Module, list]:
    """With the statistics of other images."""
    tiny = TINY_MODELS["resnet"]
    model = tiny.build().train()
    with torch.no_grad():
        for seed in range(10, 60):
            model(**tiny.batch(8, seed=seed))
    return model.eval(), [tiny.batch(6, seed=seed) for seed in range(3)]


CONFIG = {"bits": (2, 8), "group_size": 32, "ratio": 7}


def divergence(model: nn.Module, original: nn.Module, batches: list) -> float:
    with torch.no_grad():
        pairs = [
            [torch.log_softmax(one(batch["pixel_values"]).logits, 1) for one in (original, model)] for batch in batches
        ]
    return sum((old.exp() * (old - new)).sum(1).mean().item() for old, new in pairs) / len(pairs)


@pytest.mark.parametrize("theory", ["curvature", "llc"])
def test_norms_of_a_compressed_model_follow(theory, monkeypatch):
    model, batches = resnet()
    original = copy.deepcopy(model)
    result = compress(model, batches, LosslessCompressionConfig(theory=theory, **CONFIG))
    assert any(isinstance(module, CompressedModule) for module in model.modules())
    norms = batch_norms(model)
    assert norms.keys() == batch_norms(original).keys()
    before = batch_norms(original)
    assert not any(torch.equal(norm.running_mean, before[name].running_mean) for name, norm in norms.items())
    assert all((norm.running_var > 0).all() for norm in norms.values())
    assert all(not norm.training for norm in norms.values())
    monkeypatch.setattr("hf_lossless.compression.follow", lambda *arguments: None)
    left, batches = resnet()
    left_result = compress(left, batches, LosslessCompressionConfig(theory=theory, **CONFIG))
    assert left_result.plan == result.plan and left_result.size_bytes == result.size_bytes
    assert divergence(model, original, batches) < divergence(left, original, batches)


@pytest.mark.parametrize("calls", [1, 3, 4, 6, 7, 9], ids="at-call-{}".format)
def test_an_error_leaves_the_model_as_it_was(calls):
    """In calibration, in the check of the plan, in the pass for the original's moments."""
    model, batches = resnet()
    model.train()
    state = copy.deepcopy(model.state_dict())
    counter = iter(range(1, 100))

    def loss(model: nn.Module, batch: dict) -> Tensor:
        if next(counter) == calls:
            raise RuntimeError("stop")
        return batch_loss(model, batch)

    # Nothing has to be planned anew, so that 3 passes of 3 batches come before the model is changed.
    config = LosslessCompressionConfig(bits=(8,), ratio=2, group_size=16)
    with pytest.raises(RuntimeError, match="stop"):
        compress(model, batches, config, loss=loss)
    assert not any(isinstance(module, CompressedModule) for module in model.modules())
    assert all(module.training for module in model.modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_saved_model_has_the_followed_norms(tmp_path):
    tiny = TINY_MODELS["resnet"]
    settled(tiny.build()).save_pretrained(tmp_path / "model")
    config = LosslessCompressionConfig([tiny.batch(6), tiny.batch(3, seed=5)], **CONFIG)
    model = tiny.auto_class.from_pretrained(tmp_path / "model", quantization_config=config)
    model.save_pretrained(tmp_path / "small")
    again = tiny.auto_class.from_pretrained(tmp_path / "small")
    assert_same_statistics(again, model)
    assert_same_model(again, model, tiny.inputs())
