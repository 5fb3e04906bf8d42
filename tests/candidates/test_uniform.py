"""Grids against a reference that knows one group of plain Python floats at a time."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lossless.candidates.clipping import gaussian_clip, laplace_clip
from hf_lossless.candidates.uniform import quantise
from hf_lossless.storage.grid import QuantisedMatrix, dequantise, per_weight, stored_bytes
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.modules.packed import PACKED
from hf_lossless.storage.plan import Grid

BITS = [pytest.param(bits, id=f"{bits}bit") for bits in range(1, 9)]
SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
ROUNDINGS = ["nearest", "down", "up"]
TOLERANCE = 2.0**-10  # of a step: one-sided rounding takes a position this near to a level for that level
NO_LIMIT = settings(deadline=None, max_examples=300)


def values_of(quantised: QuantisedMatrix) -> Tensor:
    return dequantise(quantised.codes, quantised.scales, quantised.zeros, quantised.grid)


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def symmetric_zero(bits: int) -> float:
    return 2 ** (bits - 1) if bits > 1 else 0.5


def groups_of(row: list, grid: Grid) -> list[list]:
    size = grid.group_size or len(row)
    return [row[start : start + size] for start in range(0, len(row), size)]


def group_parameters(quantised: QuantisedMatrix, row: int) -> list[tuple[float, float]]:
    """Scale and zero of every group of a row."""
    scales = quantised.scales[row].tolist()
    if quantised.zeros is None:
        return [(scale, symmetric_zero(quantised.grid.bits)) for scale in scales]
    return list(zip(scales, quantised.zeros[row].tolist(), strict=True))


def reference_code(weight: float, scale: float, zero: float, bits: int, rounding: str) -> int:
    if scale == 0:
        return 0  # any code stands for 0
    position = weight / scale + zero
    if rounding == "nearest":
        code = round(position)
    elif (rounding == "down") == (scale > 0):  # a code down is a value down where the scale is positive
        code = math.floor(position + TOLERANCE)
    else:
        code = math.ceil(position - TOLERANCE)
    return min(max(code, 0), 2**bits - 1)


def reference_ranges(group: list[float], grid: Grid) -> list[tuple[float, float]]:
    """Every scale and zero that is tried for a group of weights."""
    low, high, last, half = min(group), max(group), 2**grid.bits - 1, 2 ** (grid.bits - 1)
    centre = 0.0 if grid.symmetric else sum(group) / len(group)
    deviations = [abs(weight - centre) for weight in group]
    laplace = laplace_clip(grid.bits) * sum(deviations) / len(group)
    gauss = gaussian_clip(grid.bits) * math.sqrt(sum(d * d for d in deviations) / len(group))
    clips = [min(clip, max(deviations)) for clip in (laplace, gauss)]
    if grid.symmetric:
        zero = symmetric_zero(grid.bits)
        sign = -1 if high > -low else 1
        full = [max(deviations) / (last - zero), max(deviations) / zero]
        return [(sign * scale, zero) for scale in full + [clip / half for clip in clips]]
    scale = (high - low) / last if high > low else abs(low)
    clipped = [(clip / half, last / 2 - centre / (clip / half) if clip else last / 2) for clip in clips]
    return [(scale, -low / scale if scale else 0.0), *clipped]


def squared_error(group: list[float], scale: float, zero: float, grid: Grid) -> float:
    codes = [reference_code(weight, scale, zero, grid.bits, grid.rounding) for weight in group]
    return sum((scale * (code - zero) - weight) ** 2 for code, weight in zip(codes, group, strict=True))


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    return Grid(
        bits=draw(st.integers(1, 8)),
        group_size=draw(st.none() | st.integers(1, 12)),
        symmetric=draw(st.booleans()),
        rounding=draw(st.sampled_from(ROUNDINGS)),
    )


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Rows of different kinds, of one magnitude: bell-shaped, constant, zero, offset, with an outlier, sparse."""
    rows, columns, seed = draw(st.integers(1, 4)), draw(st.integers(1, 24)), draw(st.integers(0, 2**20))
    matrix = random_matrix(rows, columns, seed)
    for row in matrix:
        kind = draw(st.sampled_from(["bell", "constant", "zero", "offset", "outlier", "sparse"]))
        if kind == "constant":
            row.fill_(draw(st.sampled_from([-1.0, -0.1, 0.3])))
        elif kind == "zero":
            row.zero_()
        elif kind == "offset":
            row.mul_(1e-3).add_(5)
        elif kind == "outlier":
            row[0] = 100
        elif kind == "sparse":
            row[1::2] = 0
    return matrix * 10.0 ** draw(st.sampled_from([0, 0, 0, -1, 3, -6, 6, -20, 20]))


@NO_LIMIT
@given(matrices(), grids())
def test_codes_are_those_of_the_formula(matrix, grid):
    before = matrix.clone()
    quantised = quantise(matrix, grid)
    assert torch.equal(matrix, before)
    assert quantised.codes.dtype == torch.uint8 and quantised.codes.shape == matrix.shape
    assert int(quantised.codes.max()) < 2**grid.bits
    groups = grid.num_groups(matrix.shape[1])
    assert quantised.scales.shape == (len(matrix), groups)
    assert (quantised.zeros is None) == grid.symmetric
    assert str(quantised.scales.dtype) == f"torch.{quantised.grid.scale_dtype}"
    assert quantised.grid.model_copy(update={"scale_dtype": grid.scale_dtype}) == grid
    for row, (weights, codes) in enumerate(zip(matrix.tolist(), quantised.codes.tolist(), strict=True)):
        parameters = group_parameters(quantised, row)
        weight_groups, code_groups = groups_of(weights, grid), groups_of(codes, grid)
        assert len(parameters) == len(weight_groups)
        for (scale, zero), group, group_codes in zip(parameters, weight_groups, code_groups, strict=True):
            for weight, code in zip(group, group_codes, strict=True):
                # Positions are sums in float32, so a position within its rounding of a border may go either way.
                blur = 4e-7 * (abs(zero) + 2**grid.bits)
                ends = (weight - blur * abs(scale), weight + blur * abs(scale))
                low, high = sorted(reference_code(end, scale, zero, grid.bits, grid.rounding) for end in ends)
                assert scale == 0 or low <= code <= high


@NO_LIMIT
@given(matrices(), grids())
def test_values_are_those_of_the_formula(matrix, grid):
    quantised = quantise(matrix, grid)
    values = values_of(quantised)
    assert values.dtype == torch.float32
    for row, codes in enumerate(quantised.codes.tolist()):
        pairs = zip(group_parameters(quantised, row), groups_of(codes, grid), strict=True)
        expected = [scale * (code - zero) for (scale, zero), group in pairs for code in group]
        size = max(abs(scale * zero) for scale, zero in group_parameters(quantised, row))
        assert values[row].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6 * size)


@NO_LIMIT
@given(matrices(), grids())
def test_error_inside_the_range_is_at_most_half_a_step(matrix, grid):
    """At most one step for one-sided rounding, and to the side asked for."""
    quantised = quantise(matrix, grid)
    error = (values_of(quantised).double() - matrix).flatten().tolist()
    scale = per_weight(quantised.scales, matrix.shape[1], grid).double()
    zero = symmetric_zero(grid.bits)
    if quantised.zeros is not None:
        zero = per_weight(quantised.zeros, matrix.shape[1], grid).double()
    ends = torch.stack([scale * (0 - zero), scale * (2**grid.bits - 1 - zero)])
    low, high = (end.expand_as(matrix).flatten().tolist() for end in (ends.amin(0), ends.amax(0)))
    steps = scale.abs().expand_as(matrix).flatten().tolist()
    zeros = (scale * zero).abs().expand_as(matrix).flatten().tolist()
    for weight, e, step, lowest, highest, offset in zip(
        matrix.flatten().tolist(), error, steps, low, high, zeros, strict=True
    ):
        slack = TOLERANCE * step + 4e-7 * (abs(weight) + offset)  # float32 of weight and of zero
        if lowest <= weight <= highest:
            assert abs(e) <= (step / 2 if grid.rounding == "nearest" else step) + slack
            assert e <= slack or grid.rounding != "down"
            assert e >= -slack or grid.rounding != "up"
        else:
            nearest_end = lowest if weight < lowest else highest
            assert abs(e) <= abs(weight - nearest_end) + step + slack


@NO_LIMIT
@given(matrices(), grids())
def test_the_range_taken_has_the_least_error_of_those_tried(matrix, grid):
    matrix = matrix * (1e-12 / matrix.abs().amax().clamp(min=1e-30))  # so small that scales stay in float32
    assume(matrix.any())
    quantised = quantise(matrix, grid)
    assert quantised.grid.scale_dtype == "float32"
    values = values_of(quantised)
    for weights, row_values in zip(matrix.tolist(), values.tolist(), strict=True):
        for group, group_values in zip(groups_of(weights, grid), groups_of(row_values, grid), strict=True):
            error = sum((value - weight) ** 2 for value, weight in zip(group_values, group, strict=True))
            ranges = reference_ranges(group, grid)
            least = min(squared_error(group, scale, zero, grid) for scale, zero in ranges)
            size = max(abs(weight) for weight in group)
            step = max(abs(scale) for scale, _ in ranges)
            # A weight on the border of two levels may go either way; its error is then the same, one-sided a step more.
            borders = 0 if grid.rounding == "nearest" else 2 * step * size * 1e-3
            assert error <= least * (1 + 1e-3) + len(group) * (1e-5 * size * step + (1e-6 * size) ** 2) + borders


@pytest.mark.parametrize("bits", BITS)
@SYMMETRIES
@pytest.mark.parametrize("group_size", [None, 1, 5, 16, 64], ids=lambda size: f"g{size}")
def test_rows_and_groups_are_independent(bits, symmetric, group_size):
    """A matrix is quantised as its groups are alone, the ragged last one included."""
    matrix = random_matrix(3, 18, seed=bits) * 2.0**-40  # scales in float32, as those of every group alone
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    whole = values_of(quantise(matrix, grid))
    size = group_size or 18
    for row, start in itertools.product(range(3), range(0, 18, size)):
        block = matrix[row : row + 1, start : start + size]
        alone = values_of(quantise(block, Grid(bits=bits, symmetric=symmetric)))
        torch.testing.assert_close(whole[row : row + 1, start : start + size], alone, rtol=1e-5, atol=2.0**-60)


@pytest.mark.parametrize("bits", BITS)
@SYMMETRIES
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zeros_stay_zeros(bits, symmetric, rounding):
    matrix = random_matrix(3, 12)
    matrix[1] = 0
    grid = Grid(bits=bits, symmetric=symmetric, rounding=rounding, group_size=6)
    assert torch.equal(values_of(quantise(matrix, grid))[1], torch.zeros(12))
    assert torch.equal(values_of(quantise(torch.zeros(2, 12), grid)), torch.zeros(2, 12))


@pytest.mark.parametrize("bits", BITS)
@SYMMETRIES
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("constant", [0.1, -0.1, 0.7, -3.3, 1000.3], ids=str)
def test_a_constant_group_keeps_its_value(bits, symmetric, rounding, constant):
    """To the precision of float16, and whatever the rounding; a symmetric grid has a level at one end."""
    grid = Grid(bits=bits, symmetric=symmetric, rounding=rounding)
    values = values_of(quantise(torch.full((2, 5), constant), grid))
    one_sided_step = 0.0
    if rounding != "nearest" and symmetric and bits > 1:  # the far end is many steps off, and float16 may miss it
        one_sided_step = abs(constant) / (2 ** (bits - 1) - 1)
    assert (values - constant).abs().max() <= 2.0**-11 * abs(constant) + one_sided_step


@pytest.mark.parametrize("bits", BITS)
@SYMMETRIES
def test_least_and_largest_weight_of_a_full_range_survive(bits, symmetric):
    matrix = torch.tensor([[-1.0, 1.0]]).repeat(1, 8)
    values = values_of(quantise(matrix, Grid(bits=bits, symmetric=symmetric)))
    torch.testing.assert_close(values, matrix, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids=lambda bits: f"{bits}bit")
@pytest.mark.parametrize("side", [1.0, -1.0], ids=["up", "down"])
def test_the_extra_level_lies_on_the_longer_side(bits, side):
    """-2^(b-1) .. 2^(b-1)-1 steps, turned round by a negative scale: the far end of the longer side is exact."""
    matrix = side * torch.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1) + 1).float()[None] / 2 ** (bits - 1)
    quantised = quantise(matrix, Grid(bits=bits))
    assert torch.equal(values_of(quantised), matrix)
    assert torch.sign(quantised.scales).item() == -side


@pytest.mark.parametrize(
    ("magnitude", "scale_dtype"),
    [(1.0, "float16"), (1e3, "float16"), (1e8, "float32"), (1e30, "float32"), (1e-3, "float32"), (1e-30, "float32")],
    ids=str,
)
@pytest.mark.parametrize("bits", BITS)
@SYMMETRIES
def test_magnitudes(magnitude, scale_dtype, bits, symmetric):
    """The relative error is the same at every magnitude; float32 stands in where float16 cannot hold the scales."""
    matrix = random_matrix(4, 32)
    unit = quantise(matrix, Grid(bits=bits, symmetric=symmetric))
    quantised = quantise(matrix * magnitude, Grid(bits=bits, symmetric=symmetric))
    if magnitude != 1e-3 or bits == 8:  # at a thousandth, few steps are large enough for float16
        assert quantised.grid.scale_dtype == scale_dtype
    error, unit_error = values_of(quantised) / magnitude - matrix, values_of(unit) - matrix
    assert error.norm().item() == pytest.approx(unit_error.norm().item(), rel=0.05)  # float16 costs a little


@pytest.mark.parametrize("bits", BITS)
def test_offset_groups_need_float32(bits):
    """5 +- 1e-3: the zero point lies thousands of steps away, and float16 would lose it."""
    matrix = 5 + 1e-3 * random_matrix(3, 64)
    quantised = quantise(matrix, Grid(bits=bits, symmetric=False, group_size=32))
    assert quantised.grid.scale_dtype == "float32"
    spread = (matrix.amax() - matrix.amin()).item()
    if bits > 1:
        error = (values_of(quantised) - matrix).square().mean().sqrt()
        assert error <= spread / (2**bits - 1) / 2 + 1e-6
    assert (values_of(quantised) - matrix).abs().max() <= spread


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@SYMMETRIES
def test_other_dtypes_are_quantised_as_float32(dtype, symmetric):
    matrix = random_matrix(3, 20).to(dtype)
    grid = Grid(bits=3, group_size=8, symmetric=symmetric)
    quantised, expected = quantise(matrix, grid), quantise(matrix.float(), grid)
    assert torch.equal(quantised.codes, expected.codes) and torch.equal(quantised.scales, expected.scales)


def test_a_transposed_view_is_quantised_as_its_copy():
    matrix = random_matrix(20, 3).T
    grid = Grid(bits=3, group_size=8)
    assert torch.equal(values_of(quantise(matrix, grid)), values_of(quantise(matrix.contiguous(), grid)))


def test_a_parameter_is_quantised_without_a_graph():
    quantised = quantise(nn.Parameter(random_matrix(2, 4)), Grid(bits=4))
    assert not quantised.scales.requires_grad


# Weights of columns: of the ranges, and a ladder of shares of the whole range, the one with the least weighted error.


def reference_shares(group: list[float], grid: Grid) -> list[tuple[float, float]]:
    """The ladder: from 0.3 to 0.95 of the whole range, about the same middle."""
    scale, zero = reference_ranges(group, grid)[0]
    half = (2**grid.bits - 1) / 2
    shares = []
    for step in range(6, 20):
        small = scale * step / 20
        shares.append((small, zero if grid.symmetric or small == 0 else half - scale * (half - zero) / small))
    return shares


def weighted_error(values: list[float], group: list[float], weights: list[float]) -> float:
    return sum(w * (value - weight) ** 2 for value, weight, w in zip(values, group, weights, strict=True))


@settings(deadline=None, max_examples=150)
@given(matrices(), grids(), st.integers(0, 2**20), st.sampled_from([0, 1, 3]))
def test_the_range_taken_has_the_least_weighted_error_of_those_tried(matrix, grid, seed, spread):
    grid = grid.model_copy(update={"rounding": "nearest"})
    matrix = matrix * (1e-12 / matrix.abs().amax().clamp(min=1e-30))  # so small that scales stay in float32
    assume(matrix.any())
    columns = 10.0 ** (spread * (random_matrix(1, matrix.shape[1], seed)[0]).clamp(-2, 2))
    quantised = quantise(matrix, grid, columns)
    plain = quantise(matrix, grid)
    assert quantised.codes.dtype == torch.uint8 and int(quantised.codes.max()) < 2**grid.bits
    assert (quantised.scales.shape, quantised.grid) == (plain.scales.shape, plain.grid)
    weights = groups_of(columns.tolist(), grid)
    for row, row_values in zip(matrix.tolist(), values_of(quantised).tolist(), strict=True):
        for group, values, own in zip(groups_of(row, grid), groups_of(row_values, grid), weights, strict=True):
            tried = [*reference_ranges(group, grid), *reference_shares(group, grid)]
            errors = []
            for scale, zero in tried:
                codes = [reference_code(weight, scale, zero, grid.bits, "nearest") for weight in group]
                errors.append(weighted_error([scale * (code - zero) for code in codes], group, own))
            size, step = max(abs(weight) for weight in group), max(abs(scale) for scale, _ in tried)
            blur = max(own) * len(group) * (1e-5 * size * step + (1e-6 * size) ** 2)
            assert weighted_error(values, group, own) <= min(errors) * (1 + 1e-3) + blur


@pytest.mark.parametrize("bits", BITS)
@SYMMETRIES
def test_equal_column_weights_only_lengthen_the_search(bits, symmetric):
    """Whatever the weight is; the squared error is never above that without weights."""
    matrix, grid = random_matrix(5, 40) * 2.0**-40, Grid(bits=bits, group_size=16, symmetric=symmetric)
    plain = (values_of(quantise(matrix, grid)) - matrix).square().sum(1)
    ones, larger = (quantise(matrix, grid, torch.full((40,), weight)) for weight in (1.0, 1024.0))
    assert torch.equal(ones.codes, larger.codes) and torch.equal(ones.scales, larger.scales)
    assert ((values_of(ones) - matrix).square().sum(1) <= plain * (1 + 1e-5)).all()


@SYMMETRIES
def test_a_column_without_weight_may_lie_outside_the_range(symmetric):
    """The outlier costs nothing, and the others get finer steps."""
    matrix = random_matrix(3, 20)
    matrix[:, 4] = 8
    weights = torch.ones(20)
    weights[4] = 0
    grid = Grid(bits=4, symmetric=symmetric)
    errors = [
        (values_of(one) - matrix).square() @ weights
        for one in (quantise(matrix, grid, weights), quantise(matrix, grid))
    ]
    assert (errors[0] < 0.95 * errors[1]).all()


def test_column_weights_of_zero():
    matrix = random_matrix(2, 10)
    quantised = quantise(matrix, Grid(bits=3, group_size=4), torch.zeros(10))
    assert torch.isfinite(values_of(quantised)).all() and quantised.scales.all()


# More bits. The squared error of one matrix may rise with a bit: four levels that fit the weights exactly beat eight
# that do not. What holds is (1) the bound by the whole range's step, which falls; (2) nesting: the symmetric grid
# reach * k / 2^(b-1) of b bits is part of that of b+1 bits, and the whole-range grid of b bits is part of that of a
# multiple of b bits, for 2^b - 1 divides 2^(kb) - 1; (3) on bell-shaped weights the error falls with every bit.


def test_one_more_bit_may_raise_the_error_of_a_matrix():
    matrix = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    two, three = (quantise(matrix, Grid(bits=bits, symmetric=False)) for bits in (2, 3))
    assert torch.equal(values_of(two), matrix)
    assert not torch.allclose(values_of(three), matrix, atol=0.1)


@NO_LIMIT
@given(matrices(), st.integers(1, 8), st.booleans())
def test_squared_error_is_bounded_by_half_a_step_of_the_whole_range(matrix, bits, symmetric):
    quantised = quantise(matrix, Grid(bits=bits, symmetric=symmetric))
    error = (values_of(quantised).double() - matrix).square().sum(1).tolist()
    for row, squares in zip(matrix.double(), error, strict=True):
        size = row.abs().max().item()
        whole = 2 * size if symmetric else (row.max() - row.min()).item()
        step = whole / (2**bits - 1 - (symmetric and bits > 1))  # a symmetric grid has one level to spare
        rounding = 2.0**-10 * size  # of scales to float16
        assert squares <= len(row) * (step / 2 + rounding) ** 2 * (1 + 1e-5)


@NO_LIMIT
@given(matrices(), st.sampled_from([(1, 2), (1, 3), (2, 4), (3, 6), (4, 8)]))
def test_grids_of_the_whole_range_are_nested(matrix, widths):
    """The best range of the wide grid is never worse than the whole range of the narrow one."""
    matrix = matrix * (1e-12 / matrix.abs().amax().clamp(min=1e-30))  # scales in float32
    narrow, wide = widths
    grid = Grid(bits=narrow, symmetric=False)
    values = values_of(quantise(matrix, Grid(bits=wide, symmetric=False)))
    for row, row_values in zip(matrix.tolist(), values.tolist(), strict=True):
        error = sum((value - weight) ** 2 for value, weight in zip(row_values, row, strict=True))
        size = max(abs(weight) for weight in row)
        whole_range = reference_ranges(row, grid)[0]
        assert error <= squared_error(row, *whole_range, grid) * (1 + 1e-3) + len(row) * (1e-5 * size) ** 2


@pytest.mark.parametrize("density", ["gauss", "laplace", "uniform"])
@SYMMETRIES
@pytest.mark.parametrize("group_size", [None, 32], ids=["row", "g32"])
def test_every_bit_lowers_the_error_of_bell_shaped_weights(density, symmetric, group_size):
    matrix = random_matrix(16, 512)
    if density == "laplace":
        uniform_sample = torch.rand(16, 512, generator=torch.Generator().manual_seed(1)) - 0.5
        matrix = -uniform_sample.sign() * (1 - 2 * uniform_sample.abs()).clamp(min=1e-6).log()
    elif density == "uniform":
        matrix = torch.rand(16, 512, generator=torch.Generator().manual_seed(2)) * 2 - 1
    errors = []
    for bits in range(1, 9):
        quantised = quantise(matrix, Grid(bits=bits, symmetric=symmetric, group_size=group_size))
        errors.append((values_of(quantised) - matrix).square().mean().item())
    ratios = [wide / narrow for narrow, wide in itertools.pairwise(errors)]
    assert max(ratios) < 0.6  # four times less in the limit


@pytest.mark.parametrize("bits", BITS)
@SYMMETRIES
@pytest.mark.parametrize("group_size", [None, 1, 7, 8], ids=lambda size: f"g{size}")
@pytest.mark.parametrize("magnitude", [1.0, 1e-8], ids=["float16", "float32"])
def test_stored_bytes_are_those_of_the_module(bits, symmetric, group_size, magnitude):
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(13, 5, bias=False),
            "conv": nn.Conv2d(4, 6, 3, groups=2, bias=False),
            "embedding": nn.Embedding(7, 10),
        }
    )
    for layer in find_layers(model):
        layer.weight.data *= magnitude
        out_features, in_features = layer.matrix.shape
        quantised = quantise(layer.matrix, Grid(bits=bits, symmetric=symmetric, group_size=group_size))
        module = PACKED[layer.kind](layer, quantised.grid)
        module.store(quantised)
        rows = out_features if layer.kind == "embedding" else 1
        expected = stored_bytes(out_features, in_features, quantised.grid, rows=rows)
        assert sum(tensor.nbytes for tensor in module.state_dict().values()) == expected
        torch.testing.assert_close(module.matrix(), values_of(quantised), rtol=0, atol=0)


@SYMMETRIES
@pytest.mark.parametrize("group_size", [None, 1, 3, 4, 8], ids=lambda size: f"g{size}")
def test_no_rows(symmetric, group_size):
    """An embedding may be asked for the vectors of no tokens."""
    grid = Grid(bits=4, group_size=group_size, symmetric=symmetric)
    groups = grid.num_groups(8)
    scales = torch.zeros(0, groups)
    values = dequantise(torch.zeros(0, 8, dtype=torch.uint8), scales, None if symmetric else scales, grid)
    assert values.shape == (0, 8) and values.dtype == torch.float32


@pytest.mark.parametrize("group_size", [None, 4], ids=["row", "g4"])
def test_an_embedding_of_no_tokens(group_size):
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 10)})
    (layer,) = find_layers(model)
    quantised = quantise(layer.matrix, Grid(bits=3, group_size=group_size))
    module = PACKED["embedding"](layer, quantised.grid)
    module.store(quantised)
    assert module(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 10)


def test_stored_bytes_by_hand():
    grid = Grid(bits=3, group_size=64, symmetric=False)
    # 16 * 384 codes of 3 bits; 6 groups a row, each a scale and a zero of 2 bytes
    assert stored_bytes(16, 384, grid, rows=1) == 16 * 384 * 3 // 8 + 16 * 6 * 2 * 2
    assert stored_bytes(16, 384, grid.model_copy(update={"scale_dtype": "float32"}), rows=1) == 2304 + 768
    # Rows of 5 codes packed one by one: 5 codes take the 3 bytes of 8.
    assert stored_bytes(10, 5, Grid(bits=3), rows=10) == 10 * 3 + 10 * 2
