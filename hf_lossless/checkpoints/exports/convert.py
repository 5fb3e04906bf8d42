"""Converts compressed layers to the whole numbers and scales that the export formats share.

Other formats know one grid: `W[o, i] = s[o, g] * q[o, i]`, with whole numbers q of B bits, from -2^(B-1) up, and s and
the product in the model's own dtype. Ours of b bits, symmetric, without zero points, fits into B = 2, 4 or 8 bits:

    1 bit      W = scale * (code - 1/2)         q = 2 code - 1,  s = scale / 2,  B = 2
    b bits     W = scale * (code - 2^(b-1))     q = code - 2^(b-1),  s = scale,  B = the next of 2, 4, 8

The sign of s may be negative in both. A wider B than necessary is exact and costs bytes. The gemma format lacks widths
of 3, 5, 6 and 7 bits, and releases of compressed-tensors lay them out in different ways.

In float32 the product equals ours bit for bit, and in float16 where the scales are float16. Otherwise s is rounded to
the dtype, whose unit roundoff is u (2^-8 for bfloat16, 2^-11 for float16), and so are both products: a weight changes
by at most

    (1 + u)^2 / (1 - u) - 1  ~  3 u        of its size.

Beyond that (scales below the dtype's normal numbers) a layer is not convertible. This is measured for each layer, by
computing what the loader will compute.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lossless.storage.grid import per_weight
from hf_lossless.storage.kinds import KINDS
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.packed import PackedModule
from hf_lossless.storage.packing import unpack
from hf_lossless.storage.plan import LayerPlan

_CONTAINERS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


class NotConvertible(Exception):
    """A format cannot hold a layer; the message is the reason, as the predicate of "because"."""


@dataclass(frozen=True)
class Stored:
    """The tensors of a layer in an export format.

    Attributes:
        tensors: Tensors by their names inside the layer, without its bias.
        bits: Width of a whole number; None: floating point.
        group_size: Inputs of one output that share a scale; None: all of them, or no scales.
        rounded: Whether the weights changed, within the bound of the module's docstring.
    """

    tensors: dict[str, Tensor]
    bits: int | None = None
    group_size: int | None = None
    rounded: bool = False


@dataclass(frozen=True)
class WholeNumbers:
    """A layer's weight as whole numbers and scales, `s q`.

    Attributes:
        codes: q + 2^(bits-1), uint8 [out, in].
        scales: s [out, groups], in the model's dtype.
        bits: 2, 4 or 8.
        group_size: Inputs that share a scale; None: all of an output.
        rounded: Whether `s q` differs from the layer's matrix.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int | None
    rounded: bool


def compressed_module(model: PreTrainedModel, name: str) -> CompressedModule:
    """Returns a layer of a loaded model; raises NotConvertible where its input is quantised, which no format holds."""
    module = model.get_submodule(name)
    assert isinstance(module, CompressedModule)
    if module.activation is not None:
        raise NotConvertible("its input is quantised")
    return module


def model_dtype(model: PreTrainedModel) -> torch.dtype:
    """Returns the dtype that a model was loaded in; single weights may have another one."""
    dtype = model.config.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def whole_numbers(module: CompressedModule, layer_plan: LayerPlan, dtype: torch.dtype) -> WholeNumbers:
    """Converts a layer's weight to whole numbers times scales.

    Args:
        module: The loaded layer.
        layer_plan: Its plan.
        dtype: Dtype of the model.

    Raises:
        NotConvertible: Its grid is not symmetric, other modules use its weight, or the dtype cannot represent its
            scales.
    """
    if layer_plan.tied:
        raise NotConvertible(f"it shares its weight with {', '.join(layer_plan.tied)}")
    if layer_plan.kind != "grid" or not isinstance(module, PackedModule):
        raise NotConvertible(f"it is stored as {KINDS[layer_plan.kind].words}")
    grid, (out_features, in_features) = module.grid, module.matrix_shape
    if not grid.symmetric:
        raise NotConvertible("its grid has zero points")
    if module.dtype != dtype:
        raise NotConvertible(f"transformers computes it in {module.dtype} and the rest in {dtype}")
    bits = _CONTAINERS[grid.bits]
    rows = len(module.codes)
    codes = unpack(module.codes, grid.bits, out_features * in_features // rows).view(out_features, in_features)
    numbers = codes.to(torch.int16)
    numbers = 2 * numbers - 1 if grid.bits == 1 else numbers - 2 ** (grid.bits - 1)
    scales = (module.scales.float() / 2 if grid.bits == 1 else module.scales).to(dtype)
    product = numbers.to(dtype) * per_weight(scales, in_features, grid).to(dtype)
    return WholeNumbers(
        codes=(numbers + 2 ** (bits - 1)).to(torch.uint8),
        scales=scales,
        bits=bits,
        group_size=None if grid.num_groups(in_features) == 1 else grid.group_size,
        rounded=_moved(product, module.matrix()),
    )


def largest_move(dtype: torch.dtype) -> float:
    """Computes the largest relative change of a weight when scales are rounded to a dtype: (1 + u)^2 / (1 - u) - 1.

    Example:
        >>> round(largest_move(torch.bfloat16), 4)
        0.0118
    """
    roundoff = torch.finfo(dtype).eps / 2
    return (1 + roundoff) ** 2 / (1 - roundoff) - 1


def _moved(theirs: Tensor, ours: Tensor) -> bool:
    """Returns whether two matrices differ; raises NotConvertible where they differ by more than rounding explains."""
    if torch.equal(theirs, ours):
        return False
    moves = (theirs.double() - ours.double()).abs()
    if not bool((moves <= largest_move(ours.dtype) * ours.double().abs()).all()):
        raise NotConvertible(f"its scales do not fit into {ours.dtype}")
    return True


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Packs codes of 2, 4 or 8 bits in bytes, row by row: the first in the lowest bits of a byte, zeros as padding.

    Args:
        codes: uint8 [out, in], each below 2^bits.
        bits: 2, 4 or 8.

    Returns:
        uint8 [out, ceil(in * bits / 8)].

    Example:
        >>> pack_bytes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=4).tolist()  # 0x21, 0x03
        [[33, 3]]
    """
    per_byte = 8 // bits
    padded = nn.functional.pad(codes, (0, -codes.shape[1] % per_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    shifted = torch.bitwise_left_shift(padded.view(len(codes), -1, per_byte), shifts)
    return shifted.sum(-1, dtype=torch.uint8)


def name_pattern(names: list[str], base_model_prefix: str) -> str:
    r"""Makes a regular expression for exactly these modules, in a model with a head and in one without alike.

    Args:
        names: Module names.
        base_model_prefix: Prefix of the base model's module names in a model with a head.

    Example:
        >>> name_pattern(["bert.pooler.dense", "classifier"], "bert")
        '(?:bert\\.)?(?:pooler\\.dense|classifier)$'
    """
    prefix = f"{base_model_prefix}." if base_model_prefix else ""
    bare = "|".join(re.escape(name.removeprefix(prefix)) for name in names)
    return f"(?:{re.escape(prefix)})?(?:{bare})$" if prefix else f"(?:{bare})$"
