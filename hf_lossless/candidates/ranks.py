"""Chooses the ranks to try for a layer: those that save bytes (LLC Eq. 10b), up to the numerical rank."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from hf_lossless.candidates.grids import refuse_infinite
from hf_lossless.candidates.parallel import for_each_layer
from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.layers import Layer, matches

_ROUNDINGS = 8.0
"""Factor of the rounding error, since a product of two factors has more than one rounding of each number."""


def largest_rank(out_features: int, in_features: int) -> int:
    """Computes the largest rank with fewer numbers than the matrix: `r < N M / (N + M)` (LLC Eq. 10b); may be 0.

    Args:
        out_features: N, rows of the matrix.
        in_features: M, columns of the matrix.

    Example:
        >>> largest_rank(8, 8), largest_rank(384, 1536), largest_rank(3, 1)
        (3, 307, 0)
    """
    return (out_features * in_features - 1) // (out_features + in_features)


def numerical_rank(matrix: Tensor) -> int:
    """Counts the singular values above the rounding errors of the matrix's own dtype.

    Entries rounded with relative precision eps have nearly independent errors, a matrix whose largest singular
    value is about `eps * rms(W) * (sqrt(N) + sqrt(M))`. Eight times that is the threshold: with the usual one, `eps *
    max(N, M) * sigma_1`, every matrix in bfloat16 would have rank 0.

    Args:
        matrix: W [out, in], finite.

    Example:
        >>> numerical_rank(torch.outer(torch.arange(1.0, 5.0), torch.ones(3)))
        1
    """
    out_features, in_features = matrix.shape
    singular_values = torch.linalg.svdvals(matrix.detach().double())
    rms = singular_values.square().sum().div(out_features * in_features).sqrt()
    errors = torch.finfo(matrix.dtype).eps * rms * (out_features**0.5 + in_features**0.5)
    return int((singular_values > _ROUNDINGS * errors).sum())


def ranks_to_try(shape: torch.Size | tuple[int, int], numerical_rank: int) -> tuple[int, ...]:
    """Lists eighths of the largest rank that saves bytes, and the numerical rank, which is lossless.

    A matrix of zeros has the numerical rank 0 and gets rank 1, the smallest possible.

    Args:
        shape: (N, M) of the matrix.
        numerical_rank: Its numerical rank.

    Returns:
        The ranks, ascending; empty where no rank saves bytes.

    Example:
        >>> ranks_to_try((384, 384), 384)
        (23, 47, 71, 95, 119, 143, 167, 191)
        >>> ranks_to_try((384, 384), 60)
        (23, 47, 60)
    """
    largest = largest_rank(*shape)
    useful = min(largest, max(1, numerical_rank))
    eighths = {largest * eighth // 8 for eighth in range(1, 9)}
    return tuple(sorted(rank for rank in {*eighths, useful} if 1 <= rank <= useful))


def ranks_by_layer(
    layers: list[Layer], asked: Literal["auto"] | Mapping[str, tuple[int, ...]] | None
) -> dict[str, tuple[int, ...]]:
    """Finds the ranks to try, by layer name; layers without ranks are left out.

    Args:
        layers: The layers, with real weights.
        asked: The configured ranks: "auto", ranks by name or pattern, or None.

    Raises:
        ConfigurationError: No layer has a given name, or a rank is impossible or above the numerical rank.
        CalibrationError: A weight holds NaN or infinity.
    """
    if asked is None:
        return {}
    for layer in layers:
        refuse_infinite(layer)
    if asked == "auto":
        ladders = for_each_layer(
            lambda layer: ranks_to_try(layer.matrix.shape, numerical_rank(layer.matrix)), filter(_factorable, layers)
        )
        return {name: ladder for name, ladder in ladders.items() if ladder}
    chosen: dict[str, tuple[int, ...]] = {}
    for pattern, ranks in asked.items():
        matched = [layer for layer in layers if any(matches(name, pattern) for name in (layer.name, *layer.tied))]
        if not matched:
            raise ConfigurationError(
                f"ranks names {pattern!r}, but no layer that is to be compressed has such a name. "
                "Give a layer's full name, its last part, a parent's name, or a glob pattern such as '*.query'."
            )
        for layer in matched:
            _refuse_ranks(layer, ranks)
            chosen[layer.name] = tuple(sorted({*chosen.get(layer.name, ()), *ranks}))
    return chosen


def _factorable(layer: Layer) -> bool:
    """Tells whether a layer's matrix is one product; that of a grouped convolution is not."""
    return not (isinstance(layer.module, nn.Conv2d) and layer.module.groups > 1)


def _refuse_ranks(layer: Layer, ranks: tuple[int, ...]) -> None:
    """Raises ConfigurationError for a rank that the layer cannot have, or that is above the numerical rank."""
    out_features, in_features = layer.matrix.shape
    where = f"ranks gives layer {layer.name!r} [{out_features}, {in_features}] the rank {max(ranks)}"
    if not _factorable(layer):
        raise ConfigurationError(f"{where}, but it is a grouped convolution. Leave it out of ranks.")
    largest = largest_rank(out_features, in_features)
    if max(ranks) > largest:
        limit = out_features * in_features / (out_features + in_features)
        remedy = f"Give ranks from 1 to {largest}" if largest else "Leave it out of ranks"
        raise ConfigurationError(
            f"{where}, but two factors have fewer numbers than the matrix only below N M / (N + M) = {limit:.1f}. "
            f"{remedy}."
        )
    most = numerical_rank(layer.matrix)
    if max(ranks) > max(most, 1):
        what = "is zero" if most == 0 else f"has the numerical rank {most}"
        raise ConfigurationError(
            f"{where}, but its matrix {what}, so that rank {max(most, 1)} holds all of it. Give that rank."
        )
