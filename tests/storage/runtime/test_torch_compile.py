"""Compressed models compile and export in one graph, and compute there what they do otherwise."""

import numpy as np
import pytest
import torch
from tiny_models import TINY_MODELS
from torch import nn

from hf_lossless.candidates.uniform import quantise
from hf_lossless.storage.entropy.matrix import CodedMatrix, encode
from hf_lossless.storage.entropy.steps import decode_steps, encode_steps
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.coded import CODED
from hf_lossless.storage.modules.packed import PACKED
from hf_lossless.storage.modules.tied import TiedLinear
from hf_lossless.storage.plan import Grid
from hf_lossless.storage.runtime import choose
from hf_lossless.storage.runtime.int8_linear import Int8Linear, int8_available
from hf_lossless.storage.runtime.optimize import optimize
from hf_lossless.storage.values import EncodedMatrix

pytestmark = [
    pytest.mark.skipif(not int8_available(), reason="this torch has no FBGEMM"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def steps(values: np.ndarray) -> np.ndarray:
    return decode_steps(*encode_steps(values.astype(np.float32)))


def coded(layer: Layer) -> CompressedModule:
    weight = layer.matrix.detach().numpy()
    rows = steps(np.abs(weight).max(1) / 40)
    columns = steps(np.ones(weight.shape[1]))
    codes = np.rint(weight / rows[:, None]).astype(np.int32)
    codes[1, 0], codes[-1, 1], codes[-1, 2] = 300, -200, 90  # beyond a byte, and beyond what is safe
    content = encode(matrix := CodedMatrix.of(codes, rows, columns))
    module = CODED[layer.kind](layer, len(content))
    module.store(EncodedMatrix(matrix, content))
    return module


def packed(layer: Layer) -> CompressedModule:
    quantised = quantise(layer.matrix.detach(), Grid(bits=4, group_size=8))
    module = PACKED[layer.kind](layer, quantised.grid)
    module.store(quantised)
    return module


NAMES = ["bert", "vit", "resnet", "gpt2"]


def pairwise(*runtimes: str) -> pytest.MarkDecorator:
    """Every model in every run time, in one of the two kinds of storage: a graph takes half a second and more."""
    cases = [
        (name, (coded, packed)[(index + place) % 2], runtime)
        for index, name in enumerate(NAMES)
        for place, runtime in enumerate(runtimes)
    ]
    return pytest.mark.parametrize(("name", "model", "runtime"), cases, indirect=["name", "model"])


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(params=[coded, packed])
def model(name: str, request, monkeypatch) -> nn.Module:
    monkeypatch.setattr(choose, "SMALL", 0)
    model = TINY_MODELS[name].build()
    model.config.use_cache = False
    for layer in find_layers(model):
        model.set_submodule(layer.name, module := request.param(layer))
        for tied in layer.tied:
            model.set_submodule(tied, TiedLinear(module, None))
    return model


def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pairwise("auto", "fast", "exact")
def test_one_graph(model: nn.Module, name: str, runtime: str):
    inputs = TINY_MODELS[name].inputs()
    optimize(model, runtime)
    expected = logits(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, inputs), expected, rtol=1e-4, atol=1e-5)


@pairwise("auto", "exact")
def test_exports(model: nn.Module, name: str, runtime: str):
    inputs = TINY_MODELS[name].inputs()
    optimize(model, runtime)
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, strict=False)
    torch.testing.assert_close(exported.module()(**inputs).logits, logits(model, inputs), rtol=1e-4, atol=1e-5)


def test_every_run_time_stays_near_the_exact_one(model: nn.Module, name: str):
    inputs = TINY_MODELS[name].inputs()
    optimize(model, "exact")
    expected = logits(model, inputs)
    assert not any(isinstance(module.form, Int8Linear) for module in model.modules() if hasattr(module, "form"))
    for runtime in ("auto", "fast"):
        optimize(model, runtime)
        found = logits(model, inputs)
        assert (found - expected).norm() < 0.05 * expected.norm()
        assert runtime == "auto" or not torch.equal(found, expected)
    optimize(model, "small")
    assert torch.equal(logits(model, inputs), expected)
