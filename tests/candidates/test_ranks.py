"""Which ranks are tried, and which are refused."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lossless.candidates.ranks import largest_rank, numerical_rank, ranks_by_layer, ranks_to_try
from hf_lossless.errors import CalibrationError, ConfigurationError
from hf_lossless.storage.layers import find_layers

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


@given(st.integers(1, 60), st.integers(1, 60))
def test_largest_rank_equals_brute_force(out_features, in_features):
    saving = [
        rank
        for rank in range(1, min(out_features, in_features) + 2)
        if rank * (out_features + in_features) < out_features * in_features
    ]
    assert largest_rank(out_features, in_features) == max(saving, default=0)


def product(rank: int, shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, generator=generator).double() for size in ((shape[0], rank), (rank, shape[1])))
    return left @ right


@DTYPES
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (300, 20)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-9])
def test_numerical_rank_of_a_product(dtype, rank, shape, scale):
    """Whether the factors or their product alone were rounded."""
    matrix = (product(rank, shape) * scale).to(dtype)
    assert numerical_rank(matrix) == rank
    assert numerical_rank(nn.Parameter(matrix)) == rank
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, generator=generator).to(dtype) for size in ((shape[0], rank), (rank, shape[1])))
    assert numerical_rank(left @ right) == rank


@DTYPES
@pytest.mark.parametrize("shape", [(24, 40), (300, 20), (1, 7), (7, 1), (1, 1)], ids=str)
def test_numerical_rank_of_full_rank(dtype, shape):
    assert numerical_rank(torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)) == min(shape)


@DTYPES
def test_numerical_rank_of_an_orthogonal_matrix(dtype):
    Q, _ = torch.linalg.qr(product(48, (48, 48)))
    assert numerical_rank(Q.to(dtype)) == 48


def test_the_numerical_rank_holds_all_of_the_matrix():
    """What it leaves is no more than rounding in the matrix's own dtype."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        matrix = product(5, (48, 64)).to(dtype)
        U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        rank = numerical_rank(matrix)
        left = (U[:, :rank] * S[:rank] @ Vt[:rank] - matrix.double()).square().mean().sqrt()
        assert left <= torch.finfo(dtype).eps * matrix.double().square().mean().sqrt()


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 2000))
def test_ranks_to_try(out_features, in_features, numerical):
    numerical = min(numerical, out_features, in_features)
    ranks, largest = ranks_to_try((out_features, in_features), numerical), largest_rank(out_features, in_features)
    assert list(ranks) == sorted(set(ranks)) and len(ranks) <= 9
    if largest == 0:
        assert ranks == ()
        return
    assert 1 <= ranks[0] and ranks[-1] == min(largest, max(numerical, 1))
    assert all(rank in ranks for rank in (largest * part // 8 for part in range(1, 9)) if 1 <= rank <= ranks[-1])


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(40, 24),
            "block": nn.ModuleDict({"query": nn.Linear(24, 24), "key": nn.Linear(24, 24), "value": Conv1D(48, 24)}),
            "conv": nn.Conv2d(4, 16, 3),
            "grouped": nn.Conv2d(8, 16, 3, groups=2),
            "single": nn.Linear(24, 1),
        }
    )


def test_no_ranks_are_asked():
    assert ranks_by_layer(find_layers(model()), None) == {}


def test_auto_leaves_out_what_has_none():
    network = model()
    network["block"]["key"].weight.data = product(3, (24, 24)).float()
    network["block"]["value"].weight.data.zero_()
    found = ranks_by_layer(find_layers(network), "auto")
    assert list(found) == ["embedding", "block.query", "block.key", "block.value", "conv"]
    assert found["embedding"] == ranks_to_try((40, 24), 24)
    assert found["block.query"] == (1, 2, 4, 5, 6, 8, 9, 11)
    assert found["block.key"] == (1, 2, 3)
    assert found["block.value"] == (1,)
    assert found["conv"] == ranks_to_try((16, 36), 16)


def test_names_and_patterns():
    layers = find_layers(model())
    asked = {"block": (2, 4), "*.query": (3,), "conv": (1,)}
    assert ranks_by_layer(layers, asked) == {
        "block.query": (2, 3, 4),  # what both entries ask
        "block.key": (2, 4),
        "block.value": (2, 4),
        "conv": (1,),
    }
    assert ranks_by_layer(layers, {"value": (5,)}) == {"block.value": (5,)}
    tied = [replace(layer, tied=("head",)) if layer.name == "block.key" else layer for layer in layers]
    assert ranks_by_layer(tied, {"head": (2,)}) == {"block.key": (2,)}  # any name of a shared weight will do


REFUSED = {
    "unknown": (
        "pooler",
        1,
        r"ranks names 'pooler', but no layer that is to be compressed has such a name\. Give a layer's full name, its "
        r"last part, a parent's name, or a glob pattern such as '\*\.query'\.",
    ),
    "too-large": (
        "block.query",
        12,
        r"ranks gives layer 'block\.query' \[24, 24\] the rank 12, but two factors have fewer numbers than the matrix "
        r"only below N M / \(N \+ M\) = 12\.0\. Give ranks from 1 to 11\.",
    ),
    "conv1d-too-large": ("value", 16, r"layer 'block\.value' \[48, 24\] the rank 16.* = 16\.0\. Give ranks from 1 to"),
    "too-small": ("single", 1, r"layer 'single' \[1, 24\] the rank 1, .* = 1\.0\. Leave it out of ranks\."),
    "grouped": (
        "grouped",
        2,
        r"layer 'grouped' \[16, 36\] the rank 2, but it is a grouped convolution\. Leave it out of ranks\.",
    ),
    "zero": (
        "block.key",
        2,
        r"layer 'block\.key' \[24, 24\] the rank 2, but its matrix is zero, so that rank 1 holds all of it\. Give that",
    ),
    "rank-one": (
        "embedding",
        5,
        r"layer 'embedding' \[40, 24\] the rank 5, but its matrix has the numerical rank 1, so that rank 1 holds all "
        r"of it\. Give that rank\.",
    ),
}


@pytest.mark.parametrize(("name", "rank", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(name, rank, message):
    network = model()
    network["block"]["key"].weight.data.zero_()
    network["embedding"].weight.data = product(1, (40, 24)).float()
    with pytest.raises(ConfigurationError, match=message):
        ranks_by_layer(find_layers(network), {name: (1, rank)} if rank > 1 else {name: (rank,)})


def test_the_limits_themselves_are_allowed():
    network = model()
    network["block"]["key"].weight.data.zero_()
    network["embedding"].weight.data = product(3, (40, 24)).float()
    asked = {"block.query": (11,), "block.key": (1,), "embedding": (3,)}
    assert ranks_by_layer(find_layers(network), asked) == asked


def test_a_group_pattern_is_refused_for_its_first_misfit():
    with pytest.raises(ConfigurationError, match=re.escape("layer 'grouped' [16, 36]")):
        ranks_by_layer(find_layers(model()), {"*": (2,)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("asked", ["auto", {"conv": (1,)}], ids=["auto", "by-name"])
def test_a_weight_that_is_not_finite(value, asked):
    network = model()
    network["block"]["query"].weight.data[2, 3] = value
    with pytest.raises(CalibrationError, match=r"the weight of layer 'block\.query' holds NaN or infinity"):
        ranks_by_layer(find_layers(network), asked)
