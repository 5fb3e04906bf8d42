"""Codes, laid out as a format wants them, are what the format's own code unpacks."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded_plans import apply_rounded
from tiny_plans import by_hand, fitting_grid
from torch import Tensor, nn
from transformers.integrations import gemma_quant
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_lossless import Grid, LayerPlan
from hf_lossless.checkpoints.exports.compressed_tensors import pack_words
from hf_lossless.checkpoints.exports.convert import (
    NotConvertible,
    largest_move,
    name_pattern,
    pack_bytes,
    whole_numbers,
)
from hf_lossless.checkpoints.exports.gemma import pack_numbers
from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.modules.packed import PACKED, PackedModule

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_codes(bits: int, rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def packed_layer(codes: Tensor, scales: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[PackedModule, LayerPlan]:
    """A linear layer with these codes, and its plan."""
    linear = nn.Linear(codes.shape[1], codes.shape[0], bias=False, dtype=dtype)
    module = PACKED["linear"](find_layers(nn.Sequential(linear))[0], grid)
    module.store(QuantisedMatrix(codes, scales, None, grid))
    return module, LayerPlan(kind="grid", grid=grid, cost_bytes=0, predicted_loss_change=0.0)


@settings(deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), rows=st.integers(1, 5), columns=st.integers(1, 70), seed=SEEDS)
def test_words_are_what_compressed_tensors_unpacks(bits: int, rows: int, columns: int, seed: int):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(bits, rows, columns, seed)
    words = pack_words(codes, bits)
    numbers = codes.to(torch.int16) - 2 ** (bits - 1)
    assert torch.equal(helpers.unpack_from_int32(words, bits, codes.shape).to(torch.int16), numbers)
    assert torch.equal(words, helpers.pack_to_int32(numbers.to(torch.int8), bits))


@settings(deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), rows=st.integers(1, 5), columns=st.integers(1, 70), seed=SEEDS)
def test_bytes_are_what_the_gemma_format_unpacks(bits: int, rows: int, columns: int, seed: int):
    codes = random_codes(bits, rows, columns, seed)
    unpack = {2: gemma_quant._unpack_int2, 4: gemma_quant._unpack_int4, 8: lambda packed, width: packed}[bits]
    numbers = unpack(pack_numbers(codes, bits), columns)
    assert torch.equal(numbers.to(torch.int16), codes.to(torch.int16) - 2 ** (bits - 1))
    if bits < 8:
        assert pack_bytes(codes, bits).shape == (rows, -(-columns * bits // 8))


@settings(deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 4),
    groups=st.integers(1, 4),
    size=st.integers(1, 20),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    dtype=st.sampled_from(DTYPES),
    seed=SEEDS,
)
def test_a_layer_is_what_compressed_tensors_makes_of_it(
    bits: int, rows: int, groups: int, size: int, scale_dtype: str, dtype: torch.dtype, seed: int
):
    """Every width, and scales of either sign and zero, by the library's own decompression."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(rows, groups, generator=generator).mul(0.1)
    scales[torch.rand(rows, groups, generator=generator) < 0.2] = 0
    scales = torch.where(scales.abs() < 2.0**-12, 0, scales).to(getattr(torch, scale_dtype))
    grid = Grid(bits=bits, group_size=size, scale_dtype=scale_dtype)
    module, plan = packed_layer(random_codes(bits, rows, groups * size, seed), scales, grid, dtype)
    numbers = whole_numbers(module, plan, dtype)

    weights = {"num_bits": numbers.bits, "type": "int", "symmetric": True}
    groupwise = {"strategy": "group", "group_size": numbers.group_size}
    weights |= {"strategy": "channel"} if numbers.group_size is None else groupwise
    state = {
        "weight_packed": pack_words(numbers.codes, numbers.bits),
        "weight_scale": numbers.scales,
        "weight_shape": torch.tensor([rows, groups * size]),
    }
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**weights))
    theirs, ours = compressor.decompress(state, scheme)["weight"], module.matrix()
    assert theirs.dtype == ours.dtype == dtype
    assert numbers.rounded == (not torch.equal(theirs, ours))
    if dtype == torch.float32 or (dtype, scale_dtype) == (torch.float16, "float16"):
        assert not numbers.rounded
    moves = (theirs.double() - ours.double()).abs()
    assert bool((moves <= largest_move(dtype) * ours.double().abs()).all())


@settings(deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 40), seed=SEEDS)
def test_a_layer_is_what_the_gemma_format_makes_of_it(bits: int, rows: int, columns: int, seed: int):
    scales = torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed)).half()
    module, plan = packed_layer(random_codes(bits, rows, columns, seed), scales, Grid(bits=bits), torch.float32)
    numbers = whole_numbers(module, plan, torch.float32)
    theirs = gemma_quant.QuantizedLinear(columns, rows, num_bits=numbers.bits)
    theirs.weight.data, theirs.weight_scale.data = pack_numbers(numbers.codes, numbers.bits), numbers.scales
    assert torch.equal(theirs._dequantize_weights(), module.matrix())


@pytest.mark.parametrize(
    ("bits", "container"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8)], ids=str
)
def test_the_narrowest_width_that_holds_a_layer_exactly(bits: int, container: int):
    module, plan = packed_layer(random_codes(bits, 2, 9, 0), torch.ones(2, 1).half(), Grid(bits=bits), torch.float32)
    assert whole_numbers(module, plan, torch.float32).bits == container


def test_scales_that_a_dtype_cannot_hold_are_not_convertible():
    grid = Grid(bits=4, scale_dtype="float32")
    module, plan = packed_layer(random_codes(4, 2, 8, 0), torch.full((2, 1), 1e-8), grid, torch.float16)
    with pytest.raises(NotConvertible, match=r"^its scales do not fit into torch\.float16$"):
        whole_numbers(module, plan, torch.float16)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("low_rank", {}, "it is stored as two factors"),
        ("sum", {"left": 4}, "it is stored as codes plus two factors"),
        ("asymmetric", {}, "its grid has zero points"),
        ("tied", {}, "it shares its weight with decoder"),
        ("coded", {}, "it is stored as codes at their entropy"),
    ],
)
def test_why_a_layer_is_not_convertible(kind: str, settings: dict[str, int], why: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    [layer] = find_layers(model)
    plan, factors = by_hand(layer, kind if kind in ("low_rank", "sum") else "grid", **settings)
    if kind == "asymmetric":
        plan = plan.model_copy(update={"grid": fitting_grid(layer.matrix, 4, symmetric=False)})
    apply_rounded(model, {"0": plan}, {} if factors is None else {"0": factors})
    if kind == "tied":
        plan = plan.model_copy(update={"tied": ("decoder",)})
    if kind == "coded":
        plan = plan.model_copy(update={"kind": "coded"})
    with pytest.raises(NotConvertible, match=f"^{re.escape(why)}$"):
        whole_numbers(model[0], plan, torch.float32)


def test_a_layer_of_another_dtype_is_not_convertible():
    module, plan = packed_layer(random_codes(4, 2, 8, 0), torch.ones(2, 1).half(), Grid(bits=4), torch.float32)
    with pytest.raises(NotConvertible, match=r"computes it in torch\.float32 and the rest in torch\.float16"):
        whole_numbers(module, plan, torch.float16)


def test_a_pattern_means_these_modules_with_and_without_the_prefix():
    pattern = name_pattern(["bert.layer.1.query", "classifier"], "bert")
    meant = ["bert.layer.1.query", "layer.1.query", "classifier", "bert.classifier"]
    others = ["bert.layer.11.query", "bert.layer.1.query.left", "layerX1.query", "x.classifier", "x.bert.layer.1.query"]
    assert all(re.match(pattern, name) for name in meant)
    assert not any(re.match(pattern, name) for name in others)
    converted = [name for name in (*meant, *others) if should_convert_module(name, [f"(?!{pattern}).*$"])]
    assert converted == meant
    assert re.match(name_pattern(["a.b"], ""), "a.b") and not re.match(name_pattern(["a.b"], ""), ".a.b")
