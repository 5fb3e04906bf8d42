"""`Choices`: which layers may be compressed, and which ways to store them are proposed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hf_lossless.errors import ConfigurationError, check_whole_number
from hf_lossless.storage.plan import KEPT_BITS, STORAGES
from hf_lossless.storage.runtime.runtimes import Runtime, checked_runtime

Truncation = Literal["plain", "descent", "metric"]
"""How a matrix is truncated to a rank: by the plain SVD (LLC), by one whose error does not point up the gradient (LoD),
or by the SVD in the metric of the loss."""


@dataclass(frozen=True)
class Choices:
    """The layers to compress and the ways to store them among which the knapsack chooses.

    Lists and single values are accepted too; values are checked and sorted.

    Attributes:
        bits: Widths of grids, 1 to 8, ascending; 16 stands for keeping a layer unchanged.
        storage: Kinds of grids, of `STORAGES`.
        group_size: Inputs that share a scale; None: one scale per output channel.
        symmetric: Whether grids are symmetric.
        ranks: "auto", ranks by layer name or pattern, or None: no factors.
        activation_bits: Widths of quantised inputs, 2 to 8; None among them: floating point.
        modules_to_not_convert: Modules that are not compressed.
        keep_head: Whether modules outside of the base model are not compressed.
        runtime: How the compressed model is computed (`storage.runtime.runtimes`).

    Raises:
        ConfigurationError: A value is unknown or out of range.

    Example:
        >>> Choices(bits=[8, 2, 8], ranks={"head": 4})
        Choices(bits=(2, 8), storage=('fixed',), group_size=64, symmetric=True, ranks={'head': (4,)}, \
activation_bits=(None,), modules_to_not_convert=(), keep_head=False, runtime='auto')
    """

    bits: tuple[int, ...] = (2, 3, 4, 8, KEPT_BITS)
    storage: tuple[str, ...] = ("fixed",)
    group_size: int | None = 64
    symmetric: bool = True
    ranks: Literal["auto"] | dict[str, tuple[int, ...]] | None = None
    activation_bits: tuple[int | None, ...] = (None,)
    modules_to_not_convert: tuple[str, ...] = ()
    keep_head: bool = False
    runtime: Runtime = "auto"

    def __post_init__(self) -> None:
        names = self.modules_to_not_convert
        put = {
            "bits": _widths(self.bits),
            "storage": _storages(self.storage),
            "ranks": _ranks(self.ranks),
            "activation_bits": _activation_widths(self.activation_bits),
            "modules_to_not_convert": (names,) if isinstance(names, str) else tuple(names or ()),
        }
        for name, value in put.items():
            object.__setattr__(self, name, value)
        checked_runtime(self.runtime)
        if self.group_size is not None:
            check_whole_number("group_size", self.group_size, 1)

    @property
    def activation_widths(self) -> tuple[int, ...]:
        """Returns the widths among `activation_bits`."""
        return tuple(width for width in self.activation_bits if width is not None)


def _widths(bits: Any) -> tuple[int, ...]:
    """Checks and sorts the widths, each once."""
    widths = list(bits) if isinstance(bits, Iterable) else [bits]
    allowed = (*range(1, 9), KEPT_BITS)
    wrong = [width for width in widths if not isinstance(width, int) or isinstance(width, bool) or width not in allowed]
    if wrong or not widths:
        raise ConfigurationError(
            f"bits={bits!r} cannot be used{f' because of {wrong}' if wrong else ''}. "
            "Choose widths from 1 to 8, and 16 for keeping a layer, say bits=(2, 4, 8, 16)."
        )
    return tuple(sorted(set(widths)))


def _activation_widths(bits: Any) -> tuple[int | None, ...]:
    """Checks and sorts the activation widths, each once, None first where it is given."""
    given = list(bits) if isinstance(bits, Iterable) and not isinstance(bits, str) else [bits]
    widths = [width for width in given if width is not None]
    wrong = [width for width in widths if type(width) is not int or not 2 <= width <= 8]
    if wrong or not given:
        raise ConfigurationError(
            f"activation_bits={bits!r} cannot be used{f' because of {wrong}' if wrong else ''}. "
            "Choose widths from 2 to 8, and None for floating point, say activation_bits=(None, 8)."
        )
    return (*((None,) if None in given else ()), *sorted(set(widths)))


def _storages(storage: Any) -> tuple[str, ...]:
    """Checks the kinds of storage and puts them in the order of `STORAGES`, each once."""
    given = [storage] if isinstance(storage, str) else list(storage) if isinstance(storage, Iterable) else [storage]
    wrong = [one for one in given if one not in STORAGES]
    if wrong or not given:
        raise ConfigurationError(
            f"storage={storage!r} cannot be used{f' because of {wrong}' if wrong else ''}. "
            f'Choose of {", ".join(STORAGES)}, say storage=("fixed", "entropy").'
        )
    return tuple(one for one in STORAGES if one in given)


def _ranks(ranks: Any) -> Literal["auto"] | dict[str, tuple[int, ...]] | None:
    """Checks and sorts the ranks of each layer name, each once."""
    if ranks is None:
        return None
    if isinstance(ranks, str) and ranks == "auto":
        return "auto"
    remedy = 'Give "auto", or ranks by layer name, say ranks={"encoder.layer.0.output.dense": (16, 32)}.'
    if not isinstance(ranks, Mapping) or not ranks:
        raise ConfigurationError(f"ranks={ranks!r} cannot be used. {remedy}")
    by_name = {}
    for name, given in ranks.items():
        numbers = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        wrong = [one for one in numbers if not isinstance(one, int) or isinstance(one, bool) or one < 1]
        if wrong or not numbers or not isinstance(name, str):
            raise ConfigurationError(
                f"ranks gives layer {name!r} the rank {given!r}: a rank is a whole number of at least 1. {remedy}"
            )
        by_name[name] = tuple(sorted(set(numbers)))
    return by_name
