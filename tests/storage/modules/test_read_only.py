"""A write to the weight of a compressed layer raises, however it is made; reading it is reading a tensor."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tiny_models import TINY_MODELS
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from hf_lossless import ConfigurationError, LosslessCompressionConfig, compress
from hf_lossless.storage.modules.base import CompressedModule, compressed_layers
from hf_lossless.storage.modules.read_only import ReadOnlyWeight


@pytest.fixture(scope="module", params=["grid", "ranks", "coded", "conv1d"])
def layer(request: pytest.FixtureRequest) -> CompressedModule:
    settings = {
        "grid": {"bits": (3,), "loss_budget": 1e9},
        "ranks": {"bits": (3,), "ranks": "auto", "ratio": 4},
        "coded": {"storage": "entropy", "bits": (4,), "loss_budget": 1e9},
        "conv1d": {"bits": (3,), "loss_budget": 1e9},
    }[request.param]
    tiny = TINY_MODELS["gpt2" if request.param == "conv1d" else "bert"]
    model = tiny.build()
    compress(model, [tiny.batch()], LosslessCompressionConfig(**settings))
    layers = compressed_layers(model)
    return layers[
        "transformer.h.0.mlp.c_fc" if request.param == "conv1d" else "bert.encoder.layer.0.intermediate.dense"
    ]


def set_data(weight: Tensor) -> None:
    weight.data = torch.zeros(weight.shape)


def set_row(weight: Tensor) -> None:
    weight[0] = 1.0


def add_to_data(weight: Tensor) -> None:
    weight.data += 1


def set_grad(weight: Tensor) -> None:
    weight.grad = torch.zeros(weight.shape)


def want_grad(weight: Tensor) -> None:
    weight.requires_grad = True


WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda weight: weight.add_(1),
    "data +=": add_to_data,
    "data =": set_data,
    "grad =": set_grad,
    "requires_grad =": want_grad,
    "requires_grad_": lambda weight: weight.requires_grad_(),
    "row": set_row,
    "row, in place": lambda weight: weight[0].fill_(1),
    "transposed": lambda weight: weight.T.mul_(2),
    "another view": lambda weight: weight.view_as(weight).zero_(),
    "detached": lambda weight: weight.detach().copy_(torch.zeros(weight.shape)),
    "one of the rows": lambda weight: weight.unbind()[1].zero_(),
    "same dtype": lambda weight: weight.float().zero_(),
    "normal_": nn.init.normal_,
    "xavier_uniform_": lambda weight: nn.init.xavier_uniform_(tensor=weight),
    "orthogonal_": nn.init.orthogonal_,
    "out=": lambda weight: torch.add(torch.ones(1), 1, out=weight),
    "foreach": lambda weight: torch._foreach_add_([weight], 1.0),
    "lerp_": lambda weight: weight.lerp_(torch.zeros(weight.shape), 0.1),
    "a parameter of it": lambda weight: nn.Parameter(weight).data.zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_raise(layer: CompressedModule, write: Callable[[Tensor], object]):
    before = layer.matrix()
    with pytest.raises(ConfigurationError, match="would write to the weight of a compressed layer"), torch.no_grad():
        write(layer.weight)
    assert torch.equal(layer.matrix(), before)


def test_numpy_is_read_only(layer: CompressedModule):
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().numpy()[0] = 1


def test_another_weight_is_refused(layer: CompressedModule):
    for other in (nn.Parameter(torch.zeros(layer.weight.shape)), torch.zeros(layer.weight.shape)):
        with pytest.raises(ConfigurationError, match="takes no other weight"):
            layer.weight = other


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
        nn.utils.weight_norm,
        parametrizations.weight_norm,
        nn.utils.spectral_norm,
    ],
    ids=["prune", "weight_norm", "parametrised weight_norm", "spectral_norm"],
)
def test_what_replaces_weights_raises(layer: CompressedModule, change: Callable[[nn.Module], object]):
    with pytest.raises((ConfigurationError, KeyError, TypeError, ValueError)):
        change(layer)


def test_reads_are_those_of_a_tensor(layer: CompressedModule):
    weight, matrix = layer.weight, layer.matrix()
    matrix = matrix.T if layer.kind == "conv1d" else matrix
    assert isinstance(weight, ReadOnlyWeight) and torch.equal(weight, matrix)
    x = torch.randn(2, matrix.shape[1])
    product = nn.functional.linear(x, weight)
    assert type(product) is Tensor and torch.equal(product, nn.functional.linear(x, matrix))
    for made in (weight + 1, weight.clone(), weight.double(), weight.abs(), copy.deepcopy(weight.detach().clone())):
        assert type(made) is Tensor
        made.zero_()
    target = torch.zeros(matrix.shape)
    assert torch.equal(target.copy_(weight), matrix)  # a write to another tensor
    weight.requires_grad_(False)
    weight.requires_grad = False
    dense = nn.Linear(matrix.shape[1], matrix.shape[0])
    dense.weight = nn.Parameter(weight.clone())
    dense.weight.data.zero_()
    assert torch.equal(pickle.loads(pickle.dumps(weight.detach().clone())), matrix)


def test_gradients_pass_through_the_weight():
    tiny = TINY_MODELS["bert"]
    model = tiny.build()
    compress(model, [tiny.batch()], LosslessCompressionConfig(bits=(16,), ranks="auto", ratio=1.5))
    low_rank = next(one for one in compressed_layers(model).values() if type(one).__name__ == "LowRankLinear")
    low_rank.weight.square().sum().backward()
    assert low_rank.left.weight.grad.abs().sum() > 0


def test_compiled_model_reads_plain_tensors(layer: CompressedModule):
    compiled = torch.compile(lambda x: x @ layer.weight, backend="eager", fullgraph=True)
    x = torch.randn(2, layer.weight.shape[0])
    assert torch.equal(compiled(x), x @ layer.weight)
