"""One pass of statistics against plain autograd over all the data at once."""

import pytest
import torch
from tiny_models import TINY_MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from hf_lossless.calibration.statistics import Moments, calibrate
from hf_lossless.data.batches import batch_loss
from hf_lossless.errors import CalibrationError
from hf_lossless.storage.layers import as_matrix, find_layers


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def classified(rows: int, seed: int = 0, features: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator) + 0.3, torch.randint(0, 3, (rows,), generator=generator)


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def sentences(rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (rows, 7), generator=generator)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def assert_moments(moments: Moments, values: Tensor) -> None:
    values = values.detach().double()
    assert moments.count == values.numel()
    size = values.square().mean().item()
    assert moments.mean == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-5 * size**0.5)
    assert moments.variance == pytest.approx(values.var(correction=0).item(), rel=1e-5, abs=1e-5 * size)


def reference_gradients(model: nn.Module, batch) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], dict]:
    """Gradients of the mean loss: of weights, and of an error added to each layer's input alone (`e` of Eq. 3)."""
    inputs, errors, handles = {}, {}, []
    layers = find_layers(model)

    def add_error(name):
        def hook(module, arguments):
            inputs.setdefault(name, []).append(arguments[0])
            if not arguments[0].is_floating_point():
                return None
            error = torch.zeros_like(arguments[0]).requires_grad_()
            errors.setdefault(name, []).append(error)
            return (arguments[0] + error,)

        return hook

    for layer in layers:
        handles.append(layer.module.register_forward_pre_hook(add_error(layer.name)))
    weights = [layer.weight for layer in layers]
    flat_errors = [error for group in errors.values() for error in group]
    loss = batch_loss(model, batch)
    flat_errors = [error for group in errors.values() for error in group]
    gradients = torch.autograd.grad(loss, weights + flat_errors, allow_unused=True)
    for handle in handles:
        handle.remove()
    weight_gradients = {
        layer.name: torch.zeros_like(layer.weight) if gradient is None else gradient
        for layer, gradient in zip(layers, gradients, strict=False)
    }
    remaining = iter(gradients[len(weights) :])
    error_gradients = {
        name: [torch.zeros_like(error) if (gradient := next(remaining)) is None else gradient for error in group]
        for name, group in errors.items()
    }
    return weight_gradients, error_gradients, inputs


def assert_like_autograd(model: nn.Module, batches: list, whole) -> None:
    """Statistics of batches are those of one batch that holds all examples."""
    layers = find_layers(model)
    weights, errors, inputs = reference_gradients(model, whole)
    calibration = calibrate(model, batches, layers, batch_loss)
    assert list(calibration.layers) == [layer.name for layer in layers]
    assert calibration.loss == pytest.approx(batch_loss(model, whole).item(), rel=1e-6)
    for layer in layers:
        statistics = calibration.layers[layer.name]
        assert_moments(statistics.weight_gradient, weights[layer.name])
        assert statistics.calls == len(batches) * len(inputs[layer.name])
        if layer.name not in errors:
            assert statistics.inputs is None
            continue
        values = torch.cat([value.flatten() for value in inputs[layer.name]])
        assert_moments(statistics.inputs.values, values)
        assert_moments(statistics.inputs.gradient, torch.cat([error.flatten() for error in errors[layer.name]]))
        assert statistics.inputs.minimum == pytest.approx(values.min().item(), rel=1e-5)
        assert statistics.inputs.maximum == pytest.approx(values.max().item(), rel=1e-5)
        mean_deviation = (values - values.mean()).abs().mean().item()
        # Around the mean of each call, which mostly lies nearer to that call's values.
        assert 0.7 * mean_deviation < statistics.inputs.mean_deviation < 1.05 * mean_deviation


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [7, 1, 4]], ids=["one", "equal", "unequal"])
def test_network_agrees_with_autograd(sizes):
    inputs, targets = classified(12)
    batches = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    assert_like_autograd(network(), batches, (inputs, targets))


@pytest.mark.parametrize("sizes", [[8], [5, 1, 2]], ids=["one", "unequal"])
def test_bert_agrees_with_autograd(sizes):
    """Three layers share one input there, and a residual connection passes it on too."""
    whole = sentences(8)
    parts = [value.split(sizes) for value in whole.values()]
    batches = [dict(zip(whole, part, strict=True)) for part in zip(*parts, strict=True)]
    model = bert()
    assert "bert.encoder.layer.0.attention.self.query" in [layer.name for layer in find_layers(model)]
    assert_like_autograd(model, batches, whole)


def test_convolutions_agree_with_autograd():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 3)
    ).eval()
    images, targets = torch.randn(5, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    batches = [(images[:3], targets[:3]), (images[3:], targets[3:])]
    assert_like_autograd(model.to(memory_format=torch.channels_last), batches, (images, targets))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_embeddings(sparse):
    """No statistics of token ids; a sparse gradient counts as the dense one it stands for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
    ids, targets = torch.tensor([[1, 2], [2, 2], [6, 0]]), torch.tensor([0, 1, 2])
    calibration = calibrate(model, [(ids, targets)] * 2, find_layers(model), batch_loss)
    (gradient,) = torch.autograd.grad(batch_loss(model, (ids, targets)), [model[0].weight])
    assert calibration.layers["0"].inputs is None and calibration.layers["0"].calls == 2
    assert_moments(calibration.layers["0"].weight_gradient, gradient.to_dense())


class Reused(nn.Module):
    """A layer that runs twice, one module under two names, a tied pair, and one layer that never runs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.twice = nn.Linear(4, 4)
        self.again = self.twice
        self.idle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.embedding(input=ids)
        hidden = torch.tanh(self.twice(input=hidden))  # by keyword
        return self.head(torch.tanh(self.again(hidden)))


def reused_batch() -> tuple[Tensor, Tensor]:
    return torch.tensor([0, 3, 5]), torch.tensor([1, 1, 4])


def test_shared_layers_count_every_call_once():
    torch.manual_seed(0)
    model = Reused().eval()
    layers = find_layers(model)
    assert [(layer.name, layer.tied) for layer in layers] == [
        ("embedding", ("head",)),
        ("twice", ("again",)),
        ("idle", ()),
    ]
    calibration = calibrate(model, [reused_batch()], layers, batch_loss)
    ids, targets = reused_batch()
    inputs = [model.embedding(ids)]
    inputs.append(torch.tanh(model.twice(inputs[0])))
    inputs.append(torch.tanh(model.twice(inputs[1])))
    loss = F.cross_entropy(model.head(inputs[2]), targets)
    gradients = torch.autograd.grad(loss, [model.embedding.weight, model.twice.weight, *inputs])
    embedding, twice = calibration.layers["embedding"], calibration.layers["twice"]
    assert (embedding.calls, twice.calls) == (2, 2)
    assert_moments(embedding.weight_gradient, gradients[0])
    assert_moments(twice.weight_gradient, gradients[1])
    assert_moments(embedding.inputs.values, inputs[2])  # of the head, for ids are no real numbers
    assert_moments(embedding.inputs.gradient, gradients[4])
    assert_moments(twice.inputs.values, torch.cat(inputs[:2]))
    assert_moments(twice.inputs.gradient, torch.cat(gradients[2:4]))


def test_a_layer_that_never_runs():
    model = Reused()
    calibration = calibrate(model, [reused_batch()], find_layers(model), batch_loss)
    idle = calibration.layers["idle"]
    assert (idle.calls, idle.inputs, idle.weight_gradient) == (0, None, Moments(0.0, 0.0, 16))


def test_an_error_in_an_input_does_not_take_the_residual_path():
    """f(h) = w h + h: an error in the input of the layer changes the loss by w, not by w + 1."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.second.weight, 3.0)

        def forward(self, x):
            hidden = self.first(x)
            return self.second(hidden) + hidden

    model = Residual()
    calibration = calibrate(
        model, [(torch.ones(2, 1), torch.ones(2, 1))], find_layers(model), lambda m, batch: m(batch[0]).mean()
    )
    assert calibration.layers["second"].inputs.gradient == Moments(1.5, 0.0, 2)


def test_inputs_far_from_zero_keep_their_variance():
    """A thousandth of a millionth of the mean square: float32 would lose it."""
    model = nn.Sequential(nn.Linear(4, 3))
    values = 1e4 + torch.linspace(-0.5, 0.5, 40).view(10, 4)
    calibration = calibrate(model, [(values, torch.zeros(10, dtype=torch.long))], find_layers(model), batch_loss)
    variance = values.double().var(correction=0).item()
    assert calibration.layers["0"].inputs.values.variance == pytest.approx(variance, rel=1e-5)


def test_constant_inputs_have_no_variance():
    model = nn.Sequential(nn.Linear(4, 3))
    batch = (torch.full((7, 4), 0.1), torch.zeros(7, dtype=torch.long))
    inputs = calibrate(model, [batch] * 3, find_layers(model), batch_loss).layers["0"].inputs
    assert inputs.values.variance == pytest.approx(0, abs=1e-15) and inputs.minimum == inputs.maximum
    assert inputs.mean_deviation == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    model, reference = network().to(dtype), network()
    inputs, targets = classified(8)
    calibration = calibrate(model, [(inputs.to(dtype), targets)], find_layers(model), batch_loss)
    expected = calibrate(reference, [(inputs, targets)], find_layers(reference), batch_loss)
    assert calibration.loss == pytest.approx(expected.loss, rel=2e-2)
    for name, statistics in calibration.layers.items():
        assert statistics.inputs.values.variance == pytest.approx(
            expected.layers[name].inputs.values.variance, rel=0.05
        )


def test_model_is_as_before():
    model = network()
    model[0].weight.requires_grad_(False)
    model[2].bias.grad = torch.ones(5)
    model[4].weight.grad = torch.ones(3, 5)
    inputs, targets = classified(6)
    outputs, state = model(inputs).detach(), {name: value.clone() for name, value in model.state_dict().items()}
    calibration = calibrate(model, [(inputs, targets)], find_layers(model), batch_loss)
    assert calibration.layers["0"].weight_gradient.variance > 0  # of a frozen weight too
    assert torch.equal(model(inputs), outputs)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["0.weight"]
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients == {"2.bias", "4.weight"}
    assert torch.equal(model[4].weight.grad, torch.ones(3, 5))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
def test_the_callers_gradient_mode_does_not_matter(context):
    model = network()
    expected = calibrate(model, [classified(6)], find_layers(model), batch_loss)
    with context():
        before = torch.is_grad_enabled()
        assert calibrate(model, [classified(6)], find_layers(model), batch_loss) == expected
        assert torch.is_grad_enabled() == before


def test_a_part_that_runs_without_gradients():
    """A layer in a frozen part has statistics of its inputs, and a gradient of zero."""

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            hidden = self.embed(x)
            with torch.no_grad():
                hidden = self.body(hidden)
            return self.head(hidden)

    model = Frozen()
    calibration = calibrate(model, [classified(6)], find_layers(model), batch_loss)
    assert calibration.layers["body"].calls == 1
    assert calibration.layers["body"].inputs.values.variance > 0
    assert calibration.layers["body"].inputs.gradient == Moments(0.0, 0.0, 24)
    assert calibration.layers["head"].weight_gradient.variance > 0


def test_batches_weigh_by_their_examples():
    model = network()
    inputs, targets = classified(10)
    batches = [(inputs[:9], targets[:9]), (inputs[9:], targets[9:])]
    calibration = calibrate(model, batches, find_layers(model), batch_loss)
    losses = [batch_loss(model, batch).item() for batch in batches]
    assert calibration.loss == pytest.approx(0.9 * losses[0] + 0.1 * losses[1], rel=1e-6)
    assert calibration.num_examples == 10


def test_advance_is_called_after_every_batch():
    model, calls = network(), []
    calibrate(model, [classified(2)] * 3, find_layers(model), batch_loss, lambda: calls.append(1))
    assert len(calls) == 3


def test_a_loss_that_is_not_finite_names_the_batch():
    model = network()
    model[0].weight.grad = gradient = torch.ones(8, 6)
    bad = classified(2)
    bad[0][1, 1] = float("nan")
    with pytest.raises(CalibrationError, match=r"loss of calibration batch 2 of 3 is nan. Check that batch's rows"):
        calibrate(model, [classified(2), bad, classified(2)], find_layers(model), batch_loss)
    assert model[0].weight.grad is gradient
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_loss_that_depends_on_no_layer():
    model = network()
    with pytest.raises(CalibrationError, match="the loss does not depend on any layer"):
        calibrate(model, [classified(2)], find_layers(model), lambda model, batch: torch.tensor(1.0))


@pytest.mark.parametrize("name", ["bert", "resnet", "gpt2", "llama-tied"])
def test_gradients_as_matrices(name):
    """Of the mean loss, as autograd has it over all rows at once; a Conv1D's is transposed, a kernel's is flat."""
    tiny = TINY_MODELS[name]
    model, batch = tiny.build(), tiny.batch(rows=4)
    layers = find_layers(model)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 3), slice(3, 4))]
    calibration = calibrate(model, parts, layers, batch_loss, gradients=True)
    loss = sum(len(part["labels"]) / 4 * batch_loss(model, part) for part in parts)
    expected = torch.autograd.grad(loss, [layer.weight for layer in layers], allow_unused=True)
    for layer, wanted in zip(layers, expected, strict=True):
        found = calibration.layers[layer.name].gradient
        wanted = torch.zeros_like(layer.weight) if wanted is None else wanted
        assert found.dtype == torch.float32 and found.shape == layer.matrix.shape
        torch.testing.assert_close(found, as_matrix(wanted, layer.kind), rtol=1e-4, atol=1e-6)
        assert calibration.layers[layer.name].curvature is None


def test_a_sparse_gradient_is_given_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    batch = torch.tensor([[1, 2], [2, 2]]), torch.tensor([0, 1])
    found = calibrate(model, [batch], find_layers(model), batch_loss, gradients=True).layers["0"].gradient
    assert not found.is_sparse and found.shape == (7, 4) and not found[0].any() and found[2].any()


@pytest.mark.parametrize("make", [bert, Reused, network], ids=["bert", "reused", "network"])
def test_tensors_leave_the_other_statistics_alone(make):
    model = make().eval()
    batch = {"bert": sentences, "Reused": lambda rows: reused_batch()}.get(make.__name__, classified)(6)
    layers = find_layers(model)
    plain = calibrate(model, [batch], layers, batch_loss)
    full = calibrate(model, [batch], layers, batch_loss, gradients=True, curvature=True)
    assert full == plain
    assert all(layer.gradient is None and layer.curvature is None for layer in plain.layers.values())
    assert all(layer.gradient is not None and layer.curvature is not None for layer in full.layers.values())
    bare = full.without_tensors()
    assert bare == plain and bare.layers[layers[0].name].gradient is None
    assert all(layer.curvature is None for layer in bare.layers.values())
    assert full.layers[layers[0].name].gradient is not None
