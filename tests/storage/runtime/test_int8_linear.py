"""A linear layer in whole numbers computes, within 8 bits of each token, what the layer's floating-point path does."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lossless.candidates.uniform import quantise
from hf_lossless.storage.entropy.matrix import CodedMatrix, encode
from hf_lossless.storage.entropy.steps import decode_steps, encode_steps
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.coded import CODED
from hf_lossless.storage.modules.packed import PACKED
from hf_lossless.storage.plan import Grid
from hf_lossless.storage.runtime.int8_linear import Int8Linear, int8_available
from hf_lossless.storage.runtime.optimize import optimize
from hf_lossless.storage.values import EncodedMatrix

pytestmark = pytest.mark.skipif(not int8_available(), reason="this torch has no FBGEMM")

LAYERS = {
    "linear": lambda: nn.Linear(201, 187),
    "linear-without-bias": lambda: nn.Linear(201, 187, bias=False),
    "conv1d": lambda: Conv1D(187, 201),
}
STORAGES = ("coded", "coded-far", "packed", "packed-8")
EACH_STORAGE = pytest.mark.parametrize("storage", STORAGES)


def steps(values: np.ndarray) -> np.ndarray:
    return decode_steps(*encode_steps(values.astype(np.float32)))


def layer_of(storage: str, name: str = "linear") -> CompressedModule:
    torch.manual_seed(0)
    layer = find_layers(nn.ModuleDict({"layer": LAYERS[name]()}))[0]
    if storage.startswith("packed"):
        quantised = quantise(layer.matrix.detach(), Grid(bits=8 if storage == "packed-8" else 3, group_size=64))
        packed = PACKED[layer.kind](layer, quantised.grid)
        packed.store(quantised)
        return packed
    generator = np.random.default_rng(0)
    codes = generator.integers(-64, 65, tuple(layer.matrix.shape)).astype(np.int32)
    if storage == "coded-far":
        codes[3, 5], codes[9, 5], codes[8, 200], codes[0, 0] = 127, -90, -70_000, 65
    columns = generator.uniform(0.5, 2, codes.shape[1])
    columns[200] = 2.0**-10
    matrix = CodedMatrix.of(codes, steps(generator.uniform(0.001, 0.005, len(codes))), steps(columns))
    content = encode(matrix)
    coded = CODED[layer.kind](layer, len(content))
    coded.store(EncodedMatrix(matrix, content))
    return coded


def tokens(*shape: int) -> Tensor:
    """Some tokens a thousand times as large as others."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 201, generator=generator) * 10 ** torch.randn(*shape, 1, generator=generator)


def both(storage: str, input: Tensor, name: str = "linear") -> tuple[Tensor, Tensor]:
    layer = layer_of(storage, name)
    with torch.no_grad():
        expected = layer(input)
        optimize(layer, "fast")
        assert isinstance(layer.form, Int8Linear)
        return layer(input), expected


def error_of_tokens(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


@EACH_STORAGE
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 33), (3, 5, 7)], ids=str)
def test_every_token_is_as_precise_as_the_others(storage: str, name: str, shape: tuple[int, ...]):
    found, expected = both(storage, tokens(*shape), name)
    assert found.shape == expected.shape and found.dtype is torch.float32
    # A number is rounded by a 255th of the range at most, a third of that on average; tokens reach about 3 deviations.
    assert error_of_tokens(found, expected).max() < 0.02


def test_saturation_would_be_seen():
    """The largest safe codes under the largest inputs: a kernel that saturates is off by a fifth."""
    codes, ones = torch.full((8, 256), 64, dtype=torch.int8), torch.ones(8)
    form = Int8Linear.of_codes(codes, codes.float(), ones, torch.ones(256))
    input = torch.ones(3, 256)
    torch.testing.assert_close(form.product(input), input @ codes.float().T, rtol=1e-3, atol=0)


def test_columns_with_large_codes_are_exact():
    layer = layer_of("coded-far")
    input = torch.zeros(1, 201)
    input[0, 200] = 1
    with torch.no_grad():
        expected = layer(input)
        optimize(layer, "fast")
        torch.testing.assert_close(layer(input), expected, rtol=1e-6, atol=1e-7)


@EACH_STORAGE
def test_saves_the_same_and_gives_its_codes_back(storage: str):
    layer = layer_of(storage)
    saved, weight = copy.deepcopy(layer.state_dict()), layer.matrix()
    optimize(layer, "fast")
    assert storage.startswith("packed") or layer.codes is None  # held once
    assert torch.equal(layer.matrix(), weight)
    assert {name: tensor.tolist() for name, tensor in layer.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in saved.items()
    }
    optimize(layer, "exact")
    assert layer.form is None
    assert torch.equal(layer.matrix(), weight)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)], ids=str)
@EACH_STORAGE
def test_no_tokens(storage: str, shape: tuple[int, ...]):
    found, expected = both(storage, torch.zeros(*shape, 201))
    assert found.shape == expected.shape


@EACH_STORAGE
@pytest.mark.parametrize("size", [1e30, 1e-30], ids=str)
def test_inputs_of_any_size(storage: str, size: float):
    layer = layer_of(storage)
    layer.bias = None
    input = tokens(4).clamp(-3, 3) * size
    with torch.no_grad():
        expected = layer(input)
        optimize(layer, "fast")
        assert ((layer(input) - expected) / size).norm() < 0.02 * (expected / size).norm()


@EACH_STORAGE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("column", [7, 200], ids=["near", "far"])
def test_what_is_not_finite_comes_out_and_harms_no_other_token(storage: str, value: float, column: int):
    input = tokens(3, 4)
    input[1, 2, column] = value
    found, expected = both(storage, input)
    assert torch.equal(found.isfinite(), expected.isfinite())
    whole = expected.isfinite().all(-1)
    assert whole.sum() == 11
    assert error_of_tokens(found[whole], expected[whole]).max() < 1e-3


@EACH_STORAGE
def test_inputs_that_are_not_contiguous(storage: str):
    input = tokens(6, 5)
    for view in (
        input.transpose(0, 1),
        input[::2, 1:],
        input[:1].expand(3, 5, 201),
        input.permute(2, 0, 1).permute(1, 2, 0),
    ):
        found, expected = both(storage, view)
        assert error_of_tokens(found, expected).max() < 0.02


@EACH_STORAGE
def test_one_vector_and_zeros(storage: str):
    found, expected = both(storage, tokens(1)[0])
    assert found.shape == expected.shape and error_of_tokens(found, expected) < 0.02
    found, expected = both(storage, torch.zeros(2, 201))
    torch.testing.assert_close(found, expected)


@EACH_STORAGE
def test_gradients_go_the_exact_way(storage: str):
    layer, twin = layer_of(storage), layer_of(storage)
    optimize(layer, "fast")
    inputs = [tokens(3).requires_grad_() for _ in range(2)]
    outputs = [one(input) for one, input in zip((layer, twin), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    layer(tokens(3)).sum().backward()  # a bias has its gradient in whole numbers too
    assert layer.bias.grad is not None


@EACH_STORAGE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_go_the_exact_way_and_back(storage: str, dtype: torch.dtype):
    layer, twin = layer_of(storage), layer_of(storage)
    optimize(layer, "fast")
    layer.to(dtype)
    twin.to(dtype)
    assert layer.form is None
    input = tokens(3).clamp(-3, 3).to(dtype)
    with torch.no_grad():
        assert torch.equal(layer(input), twin(input))
    layer.float()
    assert isinstance(layer.form, Int8Linear)


@EACH_STORAGE
def test_autocast_goes_the_exact_way(storage: str):
    layer, twin = layer_of(storage), layer_of(storage)
    optimize(layer, "fast")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(tokens(3)), twin(tokens(3)))


@EACH_STORAGE
def test_other_tensors_loaded_are_computed_with(storage: str):
    layer = layer_of(storage)
    optimize(layer, "fast")
    other = layer_of(storage)
    with torch.no_grad():
        (other.scales if storage.startswith("packed") else other.bias).mul_(2)
        layer.load_state_dict(other.state_dict())
        assert error_of_tokens(layer(tokens(4)), other(tokens(4))).max() < 0.02


@EACH_STORAGE
def test_moves_to_meta(storage: str):
    layer = layer_of(storage)
    optimize(layer, "fast")
    layer.to("meta")
    assert layer.form is None


def answer_of(layer: CompressedModule) -> Tensor:
    torch.set_num_threads(1)
    with torch.no_grad():
        return layer(tokens(4))


@EACH_STORAGE
def test_copies_and_pickles(storage: str):
    layer = layer_of(storage)
    optimize(layer, "fast")
    expected = answer_of(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.form.number != layer.form.number
        assert torch.equal(answer_of(twin), expected)


def _in_child(layer: CompressedModule, queue: "multiprocessing.Queue[list[float]]") -> None:
    queue.put(answer_of(layer).flatten().tolist())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes(start: str):
    layer = layer_of("coded-far")
    optimize(layer, "fast")
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(layer, queue))
    child.start()
    found = queue.get(timeout=120)
    child.join()
    assert found == answer_of(layer).flatten().tolist()


@EACH_STORAGE
def test_eight_threads_at_once(storage: str):
    layer = layer_of(storage)
    optimize(layer, "fast")
    expected = answer_of(layer)
    with ThreadPoolExecutor(8) as threads:
        assert all(torch.equal(one, expected) for one in threads.map(lambda _: answer_of(layer), range(32)))
