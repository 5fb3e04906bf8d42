"""Which modules are layers, and how each is seen as a matrix."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.layers import Layer, as_matrix, find_layers, kind_of


def names_of(found: list[Layer]) -> list[str]:
    return [layer.name for layer in found]


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnInit(nn.Linear):
    """A subclass that computes as its base does."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)


@pytest.mark.parametrize(
    ("module", "kind", "shape"),
    [
        (nn.Linear(3, 5), "linear", (5, 3)),
        (OwnInit(4), "linear", (4, 4)),
        (Conv1D(5, 3), "conv1d", (5, 3)),
        (nn.Conv2d(4, 6, (3, 5)), "conv2d", (6, 60)),
        (nn.Conv2d(4, 6, 3, groups=2), "conv2d", (6, 18)),
        (nn.Conv2d(4, 4, 3, groups=4), "conv2d", (4, 9)),
        (nn.Embedding(7, 3), "embedding", (7, 3)),
        (nn.Embedding(7, 3, padding_idx=0), "embedding", (7, 3)),
        (nn.Linear(3, 5, dtype=torch.bfloat16), "linear", (5, 3)),
        (nn.Linear(3, 5, device="meta"), "linear", (5, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_kinds_and_their_matrix(module, kind, shape):
    assert kind_of(module) == kind
    (layer,) = find_layers(nn.ModuleDict({"layer": module}))
    assert (layer.name, layer.module, layer.kind, layer.tied) == ("layer", module, kind, ())
    assert layer.weight is module.weight and tuple(layer.matrix.shape) == shape


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.LayerNorm(4),
        nn.Conv1d(4, 4, 3),
        nn.Conv3d(2, 2, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.EmbeddingBag(4, 4),
        nn.Bilinear(4, 4, 4),
        OwnForward(4, 4),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Embedding(4, 4, max_norm=1.0),
        nn.Linear(4, 4, dtype=torch.complex64),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_left_alone(module):
    assert kind_of(module) is None
    assert find_layers(nn.ModuleDict({"layer": module})) == []


def test_the_matrix_has_the_order_of_the_product():
    x = torch.randn(2, 3)
    linear, transposed = nn.Linear(3, 5, bias=False), Conv1D(5, 3)
    nn.init.zeros_(transposed.bias)
    for module in (linear, transposed):
        torch.testing.assert_close(x @ find_layers(nn.Sequential(module))[0].matrix.T, module(x))
    conv = nn.Conv2d(2, 3, 2, bias=False)
    image = torch.randn(1, 2, 2, 2)
    matrix = find_layers(nn.Sequential(conv))[0].matrix
    torch.testing.assert_close(matrix @ image.flatten(), conv(image).flatten())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
def test_the_matrix_shares_the_weights_memory(kind):
    weight = torch.zeros(4, 3, 2, 2) if kind == "conv2d" else torch.zeros(4, 3)
    as_matrix(weight, kind).fill_(1)
    assert weight.eq(1).all()


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = {"query": nn.Linear(4, 4), "output": nn.ModuleDict({"dense": nn.Linear(4, 4)})}
        other = {"query": nn.Linear(4, 4), "output": nn.ModuleDict({"dense": nn.Linear(4, 4)})}
        self.encoder = nn.ModuleList([nn.ModuleDict(block), nn.ModuleDict(other)])
        self.query_head = nn.Linear(4, 2)
        self.head = nn.Linear(4, 2)


ALL = [
    "encoder.0.query",
    "encoder.0.output.dense",
    "encoder.1.query",
    "encoder.1.output.dense",
    "query_head",
    "head",
]


def test_layers_come_in_the_models_order():
    assert names_of(find_layers(Nested())) == ALL


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("head", ["head"]),  # a full name, not a part of another
        ("encoder.0.query", ["encoder.0.query"]),
        ("encoder", ALL[:4]),  # a parent
        ("encoder.1", ALL[2:4]),
        ("query", ["encoder.0.query", "encoder.1.query"]),  # a last part
        ("output", ["encoder.0.output.dense", "encoder.1.output.dense"]),  # a part in the middle
        ("output.dense", ["encoder.0.output.dense", "encoder.1.output.dense"]),
        ("*.dense", ["encoder.0.output.dense", "encoder.1.output.dense"]),
        ("encoder.[01].query", ["encoder.0.query", "encoder.1.query"]),
        ("encoder.?.query", ["encoder.0.query", "encoder.1.query"]),
        ("*head", ["query_head", "head"]),
        ("encoder.0.output", ["encoder.0.output.dense"]),
    ],
)
def test_exclusions(pattern, left):
    assert names_of(find_layers(Nested(), exclude=[pattern])) == [name for name in ALL if name not in left]


def test_exclusions_add_up():
    assert names_of(find_layers(Nested(), exclude=["query", "*head"])) == [
        "encoder.0.output.dense",
        "encoder.1.output.dense",
    ]


@pytest.mark.parametrize("pattern", ["pooler", "quer", "Head", "encoder.2", "*.pooler", "dense.output"])
def test_an_exclusion_that_matches_nothing(pattern):
    message = f"modules_to_not_convert names {pattern!r}, but the model has no such module. Give a module's full name"
    with pytest.raises(ConfigurationError) as caught:
        find_layers(Nested(), exclude=["head", pattern])
    assert str(caught.value).startswith(message)


class Sharing(nn.Module):
    """An embedding whose weight the head uses too, and whatever else is given it."""

    def __init__(self, **users: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        for name, user in users.items():
            user.weight = self.embedding.weight
            setattr(self, name, user)


def test_tied_layers_are_one():
    model = Sharing(head=nn.Linear(4, 4, bias=False), other=nn.Embedding(4, 4))
    (layer,) = find_layers(model)
    assert (layer.name, layer.kind, layer.tied) == ("embedding", "embedding", ("head", "other"))


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_a_tied_layer_is_excluded_with_any_of_its_names(name):
    assert find_layers(Sharing(head=nn.Linear(4, 4)), exclude=[name]) == []


@pytest.mark.parametrize(
    "user",
    [Conv1D(4, 4), OwnForward(4, 4), nn.Bilinear(4, 4, 4), nn.Embedding(4, 4, max_norm=1.0)],
    ids=lambda module: type(module).__name__,
)
def test_weights_shared_with_what_cannot_be_tied_are_left_alone(user):
    assert find_layers(Sharing(user=user)) == []


def test_convolutions_that_share_a_kernel_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    assert find_layers(model) == []


def test_a_module_that_holds_a_layers_weight_as_its_own():
    model = Sharing()
    model.register_parameter("copy", model.embedding.weight)
    assert find_layers(model) == []


def test_one_module_under_two_names():
    model = nn.ModuleDict({"first": nn.Linear(4, 4)})
    model["second"] = model["first"]
    (layer,) = find_layers(model)
    assert (layer.name, layer.tied) == ("first", ("second",))


def test_without_layers():
    assert find_layers(nn.Sequential(nn.ReLU(), nn.LayerNorm(3))) == []


def test_packed_rows():
    """An embedding's rows are looked up alone; all else is packed in one piece."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Conv2d(2, 3, 3))
    assert [layer.packed_rows for layer in find_layers(model)] == [9, 1, 1]
