import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.packing import pack, packed_width, unpack

WIDTHS = [pytest.param(bits, id=f"{bits}bit") for bits in range(1, 9)]
NO_LIMIT = settings(deadline=None)  # the first call of a torch operator is slow


def random_codes(rows: int, num_codes: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, num_codes), dtype=torch.uint8, generator=generator)


def reference_pack(row: list[int], bits: int) -> list[int]:
    """The layout, one bit at a time: the bits of a column's eight codes, in order, go to `homes`, in order."""
    layers = 8 // bits
    homes = [(plane, layer * bits + i) for layer in range(layers) for plane in range(bits) for i in range(bits)]
    homes += [(plane, bit) for plane in range(bits) for bit in range(layers * bits, 8)]
    columns = (len(row) + 7) // 8
    row = row + [0] * (8 * columns - len(row))
    packed = [0] * (bits * columns)
    for column in range(columns):
        code_bits = [row[slot * columns + column] >> i & 1 for slot in range(8) for i in range(bits)]
        for bit_value, (plane, bit) in zip(code_bits, homes, strict=True):
            packed[plane * columns + column] |= bit_value << bit
    return packed


@st.composite
def code_matrices(draw):
    bits = draw(st.integers(1, 8))
    rows, num_codes, seed = draw(st.integers(0, 4)), draw(st.integers(0, 70)), draw(st.integers(0, 2**20))
    return random_codes(rows, num_codes, bits, seed), bits


@NO_LIMIT
@given(code_matrices())
def test_unpack_inverts_pack(matrix_and_bits):
    codes, bits = matrix_and_bits
    rows, num_codes = codes.shape
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (rows, packed_width(num_codes, bits))
    unpacked = unpack(packed, bits, num_codes)
    assert unpacked.dtype == torch.uint8 and unpacked.is_contiguous()
    assert torch.equal(unpacked, codes) and torch.equal(codes, before)


@NO_LIMIT
@given(code_matrices())
def test_layout_equals_the_reference(matrix_and_bits):
    codes, bits = matrix_and_bits
    assert pack(codes, bits).tolist() == [reference_pack(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_codes_survive(bits):
    codes = torch.tensor([[2**bits - 1] * 8, [0] * 8], dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == [[255] * bits, [0] * bits]
    assert torch.equal(unpack(packed, bits, 8), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_code_takes_exactly_its_bits(bits):
    for num_codes in (0, 8, 16, 384):
        assert pack(random_codes(2, num_codes, bits), bits).nbytes == 2 * num_codes * bits // 8
    assert packed_width(1, bits) == packed_width(8, bits) == bits
    assert packed_width(9, bits) == 2 * bits


def test_three_bits_as_drawn():
    a, b, c, d, e, f, g, h = codes = [0b001, 0b010, 0b011, 0b100, 0b101, 0b110, 0b101, 0b011]
    spare = [g & 0b11, g >> 2 | (h & 1) << 1, h >> 1]
    expected = [a | d << 3 | spare[0] << 6, b | e << 3 | spare[1] << 6, c | f << 3 | spare[2] << 6]
    assert pack(torch.tensor([codes], dtype=torch.uint8), 3).tolist() == [expected]


def test_eight_bits_are_a_copy():
    codes = random_codes(3, 16, 8)
    packed = pack(codes, 8)
    assert torch.equal(packed, codes) and packed.data_ptr() != codes.data_ptr()
    assert unpack(packed, 8, 16).data_ptr() != packed.data_ptr()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("num_codes", [1, 48, 61])
def test_gathered_rows_unpack_alone(bits, num_codes):
    codes = random_codes(10, num_codes, bits)
    rows = torch.tensor([7, 0, 7, 3])
    assert torch.equal(unpack(pack(codes, bits)[rows], bits, num_codes), codes[rows])


def test_strided_views_are_read_right():
    codes = random_codes(40, 6, 3).T[:, ::2]
    packed = pack(codes, 3)
    assert torch.equal(unpack(packed, 3, 20), codes)
    assert torch.equal(unpack(packed[::2], 3, 20), codes[::2])


def test_meta_tensors_give_shapes():
    packed = pack(torch.empty(5, 20, dtype=torch.uint8, device="meta"), 3)
    assert packed.is_meta and packed.shape == (5, 9)
    unpacked = unpack(packed, 3, 20)
    assert unpacked.is_meta and unpacked.shape == (5, 20)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits):
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    for call in (lambda: packed_width(8, bits), lambda: pack(codes, bits), lambda: unpack(codes, bits, 8)):
        with pytest.raises(ConfigurationError, match=f"bits is {bits}: a code has 1 to 8 bits"):
            call()


def test_negative_num_codes():
    with pytest.raises(ConfigurationError, match="num_codes is -1: pass 0 or more"):
        unpack(torch.zeros(1, 0, dtype=torch.uint8), 4, -1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32], ids=str)
def test_wrong_dtype(dtype):
    with pytest.raises(ConfigurationError, match=rf"codes is {dtype} of shape \(1, 8\): pass torch.uint8"):
        pack(torch.zeros(1, 8, dtype=dtype), 4)
    with pytest.raises(ConfigurationError, match=rf"packed is {dtype} of shape \(1, 4\): pass torch.uint8"):
        unpack(torch.zeros(1, 4, dtype=dtype), 4, 8)


def test_not_a_matrix():
    with pytest.raises(ConfigurationError, match=r"codes is torch.uint8 of shape \(8,\): .*\(rows, columns\)"):
        pack(torch.zeros(8, dtype=torch.uint8), 4)


@pytest.mark.parametrize("bits", range(1, 8), ids=lambda bits: f"{bits}bit")
def test_a_code_that_does_not_fit(bits):
    codes = torch.tensor([[0, 2**bits - 1], [2**bits, 0]], dtype=torch.uint8)
    message = rf"codes holds {2**bits}, which does not fit in {bits} bits: clamp the codes to 0\.\.{2**bits - 1}"
    with pytest.raises(ConfigurationError, match=message):
        pack(codes, bits)


def test_wrong_packed_width():
    packed = pack(random_codes(2, 16, 4), 4)
    with pytest.raises(ConfigurationError, match="packed has 8 bytes a row, 16 codes of 3 bits take 6: pass the bits"):
        unpack(packed, 3, 16)
