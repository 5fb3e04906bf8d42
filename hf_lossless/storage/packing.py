"""Packs codes of 1 to 8 bits into exactly that many bits: unpack(pack(codes)) == codes.

A row of codes is padded with zeros to 8S codes and cut into eight slots of S codes, a = row[:S] to h = row[7S:]. Its
packed form is `bits` planes of S bytes, one after the other. Column j, code j of every slot, becomes byte j of every
plane. A byte first takes the whole codes that fit, from its lowest bit up, slot after slot down the planes; the bits
still free at the top of the bytes hold the slots that are left, read from plane 0 to the last one. One column:

    3 bits     bit 7  6     5  4  3   2  1  0         4 bits     bit 7  6  5  4   3  2  1  0
    plane 0      g1 g0  |   d2 d1 d0  a2 a1 a0        plane 0      e3 e2 e1 e0   a3 a2 a1 a0
    plane 1      h0 g2  |   e2 e1 e0  b2 b1 b0        plane 1      f3 f2 f1 f0   b3 b2 b1 b0
    plane 2      h2 h1  |   f2 f1 f0  c2 c1 c0        plane 2      g3 g2 g1 g0   c3 c2 c1 c0
                 spare                                plane 3      h3 h2 h1 h0   d3 d2 d1 d0

Slots and planes are contiguous, so a shift and a mask of whole arrays move a field of bits in all columns at once, in
at most 8 moves. Planes of 2 + 1 bits for 3, or 4 + 2 + 1 for 7, would split every code into two or three fields; here
most codes are one field. The cost is up to 7 codes of padding per row. Blocks that fit the cache were tried and
rejected: each of their many short operators waits for all threads.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lossless.errors import ConfigurationError


class _Field(NamedTuple):
    """`width` bits, from `code_bit` up in the codes of `slots` and from `byte_bit` up in the bytes of `planes`."""

    slots: slice
    code_bit: int
    planes: slice
    byte_bit: int
    width: int


def _fields(bits: int) -> Iterator[_Field]:
    """Splits the layout of the module docstring into fields; those of one code or one byte come lowest bit first."""
    used = 8 // bits * bits  # bits of a byte that whole codes fill; also the slots, of eight, that go there
    for bit in range(0, used, bits):
        yield _Field(slice(bit, bit + bits), 0, slice(0, bits), bit, bits)
    slot, code_bit, plane, byte_bit = used, 0, 0, used
    while slot < 8:
        width = min(bits - code_bit, 8 - byte_bit)
        yield _Field(slice(slot, slot + 1), code_bit, slice(plane, plane + 1), byte_bit, width)
        code_bit, byte_bit = code_bit + width, byte_bit + width
        if code_bit == bits:
            slot, code_bit = slot + 1, 0
        if byte_bit == 8:
            plane, byte_bit = plane + 1, used


def _move(source: Tensor, source_bit: int, source_bits: int, target: Tensor, target_bit: int, width: int) -> None:
    """Copies `width` bits of every byte from source_bit of source to target_bit of target.

    Values of source have source_bits bits. A move to bit 0 overwrites the byte of target, any other adds to it.
    """
    field, room = source, None if target_bit else target
    if source_bit > 0:
        field = torch.bitwise_right_shift(field, source_bit, out=room)
    if source_bit + width < source_bits:
        field = torch.bitwise_and(field, (1 << width) - 1, out=room)
    if target_bit > 0:
        target.add_(field, alpha=1 << target_bit)  # target | field << target_bit
    elif field is source:
        target.copy_(field)


def _regroup(matrix: Tensor, groups: int, columns: int) -> Tensor:
    """Rearranges "r (g c) -> g (r c)", which is its own inverse; a view if r or columns is 1."""
    r = matrix.shape[0]
    return matrix.reshape(r, groups, columns).transpose(0, 1).reshape(groups, r * columns)


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dtype != torch.uint8 or matrix.ndim != 2:
        got = f"{matrix.dtype} of shape {tuple(matrix.shape)}"
        raise ConfigurationError(f"{name} is {got}: pass torch.uint8 of shape (rows, columns)")


def packed_width(num_codes: int, bits: int) -> int:
    """Computes the bytes of one packed row, ceil(num_codes / 8) * bits.

    Raises:
        ConfigurationError: num_codes is negative, or bits is not 1 to 8.

    Example:
        >>> packed_width(384, bits=3)
        144
    """
    if not 1 <= bits <= 8:
        raise ConfigurationError(f"bits is {bits}: a code has 1 to 8 bits")
    if num_codes < 0:
        raise ConfigurationError(f"num_codes is {num_codes}: pass 0 or more")
    return -(-num_codes // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs every row of codes separately, in the layout of the module docstring.

    Args:
        codes: (rows, num_codes) torch.uint8, every value below 2**bits (unchecked on the meta device).
        bits: bits of a code, 1 to 8.

    Returns:
        (rows, packed_width(num_codes, bits)) torch.uint8, contiguous, on the device of codes.

    Raises:
        ConfigurationError: codes is not a torch.uint8 matrix, bits is out of range, or a code does not fit.

    Example:
        >>> codes = torch.tensor([[1, 0, 1, 1, 0, 0, 1]], dtype=torch.uint8)
        >>> pack(codes, bits=1).tolist()  # 0b1001101
        [[77]]
    """
    _check_matrix("codes", codes)
    rows, num_codes = codes.shape
    columns = packed_width(num_codes, bits) // bits
    if bits < 8 and codes.numel() > 0 and not codes.is_meta and (largest := int(codes.max())) >= 2**bits:
        remedy = f"clamp the codes to 0..{2**bits - 1} or pack with more bits"
        raise ConfigurationError(f"codes holds {largest}, which does not fit in {bits} bits: {remedy}")
    if num_codes < 8 * columns:
        codes = torch.nn.functional.pad(codes, (0, 8 * columns - num_codes))
    slots = _regroup(codes, 8, columns)
    planes = slots.new_empty(bits, rows * columns)
    for field in _fields(bits):
        _move(slots[field.slots], field.code_bit, bits, planes[field.planes], field.byte_bit, field.width)
    return _regroup(planes, rows, columns).contiguous()


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Unpacks codes that `pack` packed.

    Args:
        packed: (rows, packed_width(num_codes, bits)) torch.uint8, rows of the result of `pack`.
        bits: bits of a code, as given to pack.
        num_codes: codes in a row before packing.

    Returns:
        (rows, num_codes) torch.uint8, contiguous, on the device of packed.

    Raises:
        ConfigurationError: packed is not a torch.uint8 matrix of that width, or bits or num_codes is out of range.

    Example:
        >>> codes = torch.tensor([[5, 0, 7], [1, 2, 3]], dtype=torch.uint8)
        >>> unpack(pack(codes, bits=3)[[1]], bits=3, num_codes=3).tolist()
        [[1, 2, 3]]
    """
    _check_matrix("packed", packed)
    rows, width = packed.shape
    if width != (expected := packed_width(num_codes, bits)):
        wanted = f"{num_codes} codes of {bits} bits take {expected}"
        raise ConfigurationError(f"packed has {width} bytes a row, {wanted}: pass the bits and num_codes of its codes")
    columns = width // bits
    planes = _regroup(packed, bits, columns)
    slots = planes.new_empty(8, rows * columns)
    for field in _fields(bits):
        _move(planes[field.planes], field.byte_bit, 8, slots[field.slots], field.code_bit, field.width)
    return _regroup(slots, rows, columns)[:, :num_codes].contiguous()
