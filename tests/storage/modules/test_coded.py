"""A coded layer computes what the dense layer with the decoded weight computes."""

import copy
import pickle
import sys
import zlib

import numpy as np
import pytest
import torch
from tiny_plans import dense_twin
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lossless.errors import CheckpointError, ConfigurationError
from hf_lossless.storage.entropy.matrix import CodedMatrix, encode
from hf_lossless.storage.entropy.steps import decode_steps, encode_steps
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.modules.coded import CODED, CodedModule
from hf_lossless.storage.modules.tied import TiedEmbedding, TiedLinear
from hf_lossless.storage.values import EncodedMatrix

LAYERS = {
    "linear": lambda: nn.Linear(20, 14),
    "linear-without-bias": lambda: nn.Linear(20, 14, bias=False),
    "conv1d": lambda: Conv1D(14, 20),
    "conv2d": lambda: nn.Conv2d(4, 14, 3, stride=2, padding=1),
    "conv2d-grouped": lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2, bias=False),
    "conv2d-depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same"),
    "embedding": lambda: nn.Embedding(30, 20, padding_idx=3),
}
EACH_LAYER = pytest.mark.parametrize("name", LAYERS)
FARS = {"near": [], "far": [(0, 0, 300), (1, 2, -70_000), (1, 3, 128), (3, 5, 2**24)]}
EACH_FAR = pytest.mark.parametrize("far", FARS)


def layer_of(name: str, dtype: torch.dtype = torch.float32) -> Layer:
    torch.manual_seed(0)
    return find_layers(nn.ModuleDict({"layer": LAYERS[name]().to(dtype)}))[0]


def stored(steps) -> np.ndarray:
    return decode_steps(*encode_steps(np.float32(steps)))


def matrix_of(layer: Layer, far: str = "near", seed: int = 0, largest: int = 9) -> CodedMatrix:
    generator = np.random.default_rng(seed)
    out_features, in_features = layer.matrix.shape
    codes = generator.integers(-largest, largest + 1, (out_features, in_features)).astype(np.int32)
    rows, columns = generator.uniform(0.01, 0.05, out_features), generator.uniform(0.5, 2, in_features)
    for row, column, code in FARS[far]:
        codes[row, column] = code
        columns[column] = 2.0**-12  # so that weights stay of one size
    return CodedMatrix.of(codes, stored(rows), stored(columns))


def coded(layer: Layer, matrix: CodedMatrix) -> CodedModule:
    content = encode(matrix)
    module = CODED[layer.kind](layer, len(content))
    module.store(EncodedMatrix(matrix, content))
    return module


def dense(matrix: CodedMatrix) -> Tensor:
    """The weight in float64."""
    codes = matrix.codes.astype(np.float64)
    codes.ravel()[matrix.far_positions] = matrix.far_codes
    return torch.from_numpy(codes * matrix.row_steps[:, None].astype(np.float64) * matrix.column_steps)


def input_of(layer: Layer, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if layer.kind == "embedding":
        return torch.tensor([[0, 3, 1, 1], [29, 0, 3, 1]])
    return torch.randn((2, 4, 9, 8) if layer.kind == "conv2d" else (2, 5, 20), generator=generator).to(dtype)


@EACH_FAR
@EACH_LAYER
def test_equals_the_dense_layer(name: str, far: str):
    layer = layer_of(name)
    matrix = matrix_of(layer, far)
    module, expected = coded(layer, matrix), dense(matrix)
    torch.testing.assert_close(module.matrix().double(), expected, rtol=1e-6, atol=0)
    twin = dense_twin(layer, module.matrix())
    assert torch.equal(module.weight, twin.weight)
    x = input_of(layer)
    found, wanted = module(x), twin(x)
    if layer.kind in ("linear", "conv1d"):  # steps are applied to inputs and outputs
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, wanted)


@EACH_FAR
@EACH_LAYER
def test_linear_and_embedding_of_any_kind(name: str, far: str):
    """What tied modules call."""
    module = coded(layer_of(name), matrix_of(layer_of(name), far))
    matrix = module.matrix()
    out_features, in_features = matrix.shape
    x, bias, indices = torch.randn(3, in_features), torch.randn(out_features), torch.tensor([[0, 3], [3, 1]])
    torch.testing.assert_close(module.linear(x, bias), nn.functional.linear(x, matrix, bias), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.linear(x, None), nn.functional.linear(x, matrix), rtol=1e-4, atol=1e-5)
    assert torch.equal(module.embedding(indices), matrix[indices])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@EACH_FAR
@EACH_LAYER
def test_in_other_dtypes(name: str, far: str, dtype: torch.dtype):
    layer = layer_of(name)
    matrix = matrix_of(layer, far)
    cast, made = coded(layer, matrix).to(dtype), coded(layer_of(name, dtype), matrix)
    for module in (cast, made):
        assert module.dtype == dtype
        assert module.row_steps.dtype == module.column_steps.dtype == module.far_codes.dtype == torch.float32
        assert torch.equal(module.matrix(), dense(matrix).float().to(dtype))
    x = input_of(layer, dtype)
    found = cast(x)
    twin = dense_twin(layer, dense(matrix).to(layer.weight.dtype)).to(torch.float64)
    wanted = twin(x if layer.kind == "embedding" else x.double())
    assert found.dtype == dtype and torch.isfinite(found).all()
    size = wanted.abs().max().item()
    tolerance = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH_FAR
@EACH_LAYER
def test_autocast(name: str, far: str, dtype: torch.dtype):
    layer = layer_of(name)
    module = coded(layer, matrix_of(layer, far))
    twin, x = dense_twin(layer, module.matrix()), input_of(layer)
    with torch.autocast("cpu", dtype):
        found, wanted = module(x), twin(x)
    assert found.dtype == wanted.dtype and torch.isfinite(found).all()
    tolerance = 0.03 if dtype == torch.bfloat16 else 0.004
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("largest", [1, 127], ids="codes-to-{}".format)
def test_sums_beyond_float16(largest):
    """Z (column_steps x) is some hundred thousand, y is small."""
    layer = layer_of("linear", torch.float16)
    matrix = matrix_of(layer, largest=largest)
    columns, rows = np.full(20, 64, np.float32), np.full(14, 2.0**-15, np.float32)
    matrix = CodedMatrix(matrix.codes, rows, columns, matrix.far_positions, matrix.far_codes)
    x = torch.full((1, 20), 100.0, dtype=torch.float16)
    found = coded(layer, matrix)(x)
    expected = x.double() @ dense(matrix).T + layer.module.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-2)


@EACH_FAR
def test_lookups(far: str):
    module = coded(layer_of("embedding"), matrix_of(layer_of("embedding"), far))
    matrix = module.matrix()
    for indices in ([], [[]], 1, [1], [1, 1, 1], [[0, 29], [3, 0]], [29, 3, 1, 0, 1, 3]):
        found = module(torch.tensor(indices, dtype=torch.long))
        assert torch.equal(found, matrix[torch.tensor(indices, dtype=torch.long)])
    assert torch.equal(module(torch.tensor([3, 1], dtype=torch.int32)), matrix[[3, 1]])
    for wrong in (-1, 30, -30):
        with pytest.raises(IndexError):
            module(torch.tensor([0, wrong]))


@EACH_FAR
def test_tied(far: str):
    module = coded(layer_of("embedding"), matrix_of(layer_of("embedding"), far))
    head, twin = TiedLinear(module, nn.Parameter(torch.randn(30))), TiedEmbedding(module, None)
    x = torch.randn(2, 20)
    torch.testing.assert_close(head(x), nn.functional.linear(x, module.weight, head.bias), rtol=1e-4, atol=1e-5)
    assert torch.equal(twin(torch.tensor([1, 3])), module(torch.tensor([1, 3])))
    assert torch.equal(head.weight, module.weight) and list(twin.state_dict()) == []


@EACH_LAYER
def test_only_the_bytes_are_saved(name: str):
    layer = layer_of(name)
    matrix = matrix_of(layer, "far")
    module = coded(layer, matrix)
    assert list(module.weight_tensors) == ["coded"] and module.weight_bytes == len(encode(matrix))
    guarded = {"coded", "bias", "weight"} - ({"bias"} if module.bias is None else set())
    assert set(module.state_dict()) == guarded and not module.state_dict()["weight"].numel()
    assert not any(tensor.requires_grad for tensor in module.buffers())
    assert str(module).endswith(
        f"bits={8 * module.weight_bytes / layer.weight.numel():.2f}, bias={module.bias is not None})"
    )


@EACH_FAR
@EACH_LAYER
def test_copies(name: str, far: str):
    layer = layer_of(name)
    module, x = coded(layer, matrix_of(layer, far)), input_of(layer)
    expected = module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
    twin.codes.zero_()
    twin.coded.zero_()
    assert torch.equal(module(x), expected)  # the copy shares nothing
    there_and_back = copy.deepcopy(module).to(torch.bfloat16).to(torch.float32)
    if module.bias is None:
        assert torch.equal(there_and_back(x), expected)
    assert torch.equal(there_and_back.matrix(), module.matrix())


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@EACH_FAR
@EACH_LAYER
def test_a_state_dict_of_other_bytes(name: str, far: str, assign: bool, tmp_path):
    """Another set of codes has another length; what is computed follows."""
    layer = layer_of(name)
    source = coded(layer, matrix_of(layer, far, seed=1, largest=20))
    target = coded(layer_of(name), matrix_of(layer))
    assert len(source.coded) != len(target.coded)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert not any(target.load_state_dict(state, assign=assign))
    x = input_of(layer)
    assert torch.equal(target(x), source(x)) and torch.equal(target.matrix(), source.matrix())
    assert target.weight_bytes == source.weight_bytes


def test_a_model_without_these_bytes_keeps_its_own():
    module = coded(layer_of("linear"), matrix_of(layer_of("linear")))
    before = module.matrix()
    missing, unexpected = module.load_state_dict({"bias": torch.zeros(14)}, strict=False)
    assert (missing, unexpected) == (["coded"], []) and torch.equal(module.matrix(), before)


def flipped(content: Tensor) -> Tensor:
    content = content.clone()
    content[len(content) // 2] ^= 4
    return content


@pytest.mark.parametrize(
    "spoil",
    [
        flipped,
        lambda content: content[:-4],
        lambda content: content[:0],
        torch.zeros_like,
        lambda content: content.float(),
    ],
    ids=["flipped", "cut", "empty", "zeros", "floats"],
)
def test_a_state_dict_that_was_spoilt(spoil):
    model = nn.ModuleDict({"layer": coded(layer_of("linear"), matrix_of(layer_of("linear")))})
    state = model.state_dict()
    state["layer.coded"] = spoil(state["layer.coded"])
    with pytest.raises(CheckpointError, match=r"the tensor 'layer\.coded' cannot be decoded: .*Take the folder again"):
        model.load_state_dict(state)


def test_another_shape():
    source = coded(layer_of("linear"), matrix_of(layer_of("linear")))
    target = coded(layer_of("embedding"), matrix_of(layer_of("embedding")))
    with pytest.raises(CheckpointError, match=r"a matrix \[14, 20\], and not \[30, 20\]"):
        target.load_state_dict({"coded": source.coded})


def test_on_meta_it_only_has_room():
    with torch.device("meta"):
        layer = layer_of("linear")
    module = CODED["linear"](layer, 123)
    assert module.coded.is_meta and module.coded.shape == (123,) and module.codes is None
    assert set(module.state_dict()) == {"coded", "bias"}
    assert module.weight.is_meta and module.weight.shape == (14, 20) and module.weight._is_hf_initialized


def test_without_constriction_only_version_1_cannot_be_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    module = coded(layer_of("linear"), matrix_of(layer_of("linear")))
    module.decode("layer")
    header, body = bytearray(module.coded[:27].numpy().tobytes()), module.coded[31:].numpy().tobytes()
    header[4] = 1
    content = bytes(header) + zlib.crc32(body, zlib.crc32(header)).to_bytes(4, "little") + body
    module.coded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    with pytest.raises(ConfigurationError, match=r"pip install 'hf-lossless\[entropy\]'"):
        module.decode("layer")


def test_gradients_reach_the_input_and_the_bias():
    layer = layer_of("linear")
    module = coded(layer, matrix_of(layer))
    x = torch.randn(3, 20, requires_grad=True)
    module(x).square().sum().backward()
    y = module(x).detach()
    torch.testing.assert_close(x.grad, 2 * y @ module.matrix(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.bias.grad, 2 * y.sum(0), rtol=1e-4, atol=1e-4)


@EACH_FAR
@EACH_LAYER
def test_forgotten_bytes_are_made_again(name: str, far: str):
    layer = layer_of(name)
    module = coded(layer, matrix_of(layer, far))
    before = module.coded.clone()
    module.forget_bytes()
    assert not module.coded.numel()
    assert torch.equal(module.state_dict()["coded"], before)
    assert not module.coded.numel()  # made for the state dict alone
    assert module.weight_bytes == len(before)
    module.recode()
    assert torch.equal(module.coded, before)
