"""Steps of rows and columns in one byte each: five bits of exponent, three of mantissa.

    step = (1 + m / 8) 2^(e + base),      e = byte // 8,  m = byte % 8

with one base for all steps of the rows, and one for those of the columns. The stored step is within 1/16 of the given
one. A grid may have any step, as long as its codes are made with the step that is stored; the loss is flat around the
optimal step. Powers of two and eighths are exact in every floating-point format, so that all machines read the same
steps.
"""

import numpy as np
from numpy.typing import NDArray

_EXPONENTS = 32

_SMALLEST_BASE = -128
"""The base is stored in an int8."""

LARGEST_BASE = 96
"""With a larger base, the largest step would overflow float32."""


def encode_steps(steps: NDArray[np.float32]) -> tuple[NDArray[np.uint8], int]:
    """Encodes steps as the nearest bytes, and returns these with the base.

    Args:
        steps: Positive and finite. A step more than 32 octaves below the largest, or below 2^-128, is stored as the
            smallest possible one.

    Example:
        >>> encode_steps(np.array([1.0, 1.5, 0.26], dtype=np.float32))
        (array([248, 252, 232], dtype=uint8), -31)
    """
    mantissas, exponents = np.frexp(steps.astype(np.float64))  # steps = mantissa 2^exponent, mantissa in [1/2, 1)
    positions = (exponents - 1) * 8 + np.rint((2 * mantissas - 1) * 8).astype(np.int64)
    base = min(max(int(positions.max()) // 8 - (_EXPONENTS - 1), _SMALLEST_BASE), LARGEST_BASE)
    return np.clip(positions - 8 * base, 0, 8 * _EXPONENTS - 1).astype(np.uint8), base


def decode_steps(codes: NDArray[np.uint8], base: int) -> NDArray[np.float32]:
    """Decodes the bytes of steps.

    Example:
        >>> decode_steps(np.array([248, 252, 232], dtype=np.uint8), -31)
        array([1.  , 1.5 , 0.25], dtype=float32)
    """
    return np.ldexp(1 + (codes % 8) / 8, codes.astype(np.int32) // 8 + base).astype(np.float32)
