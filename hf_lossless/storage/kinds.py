"""`KINDS`: everything that differs between kinds of storage, in one place.

Reports, cards, pictures, messages and `apply` read it; a new kind is a part of `LayerPlan`, a module and an entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_lossless.errors import PlanError
from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.coded import CODED
from hf_lossless.storage.modules.low_rank import LOW_RANK
from hf_lossless.storage.modules.packed import PACKED
from hf_lossless.storage.plan import KEPT_BITS, CompressionPlan, LayerPlan, LayerPlanKind
from hf_lossless.storage.values import EncodedMatrix, FactoredMatrix


@dataclass(frozen=True)
class Kind:
    """A way to store a layer.

    Attributes:
        words: Words for reports, as in "12 layers as codes on a grid".
        colour: Colour of its bars, from Okabe and Ito's palette.
        module: Makes the empty module of a layer with this plan, on the layer's device; None: the layer is not
            replaced.
        values: Class of its values (see `storage.values`); None: there are none.
        extra: The extra of this package that makes loading it several times faster; None: there is none. Nothing beside
            the package is needed.
        checksum: Whether its bytes hold a checksum.
        width: Returns a layer's bits as the text of a table cell.
    """

    words: str
    colour: str
    module: Callable[[Layer, LayerPlan], CompressedModule] | None
    values: type[Any] | None
    extra: str | None
    checksum: bool
    width: Callable[[LayerPlan], str]


def _packed(layer: Layer, plan: LayerPlan) -> CompressedModule:
    assert plan.grid is not None
    return PACKED[layer.kind](layer, plan.grid)


def _low_rank(layer: Layer, plan: LayerPlan) -> CompressedModule:
    assert plan.low_rank is not None
    _refuse_other_shape(layer, plan.low_rank.shape, "factorises")
    groups = getattr(layer.module, "groups", 1)
    if groups != 1:
        raise PlanError(
            f"the plan factorises layer {layer.name!r}, a convolution in {groups} groups: only one in one group has "
            "such factors. Plan a grid for it."
        )
    if plan.kind == "low_rank" and plan.low_rank.numbers_share >= 1:
        shape = list(layer.matrix.shape)
        raise PlanError(
            f"the plan gives layer {layer.name!r} {shape} the rank {plan.low_rank.rank}, which saves nothing: its "
            f"factors hold as many numbers as its weight or more. Plan a rank below "
            f"{shape[0] * shape[1] / sum(shape):.4g}, or a grid."
        )
    return LOW_RANK[layer.kind](layer, plan.low_rank, plan.grid)


def _coded(layer: Layer, plan: LayerPlan) -> CompressedModule:
    assert plan.coded is not None
    _refuse_other_shape(layer, plan.coded.shape, "codes")
    if plan.weight_bytes < 0:
        raise PlanError(
            f"the plan gives layer {layer.name!r} {plan.cost_bytes} bytes, fewer than its input's range takes. "
            "Take config.json again from where the checkpoint came from."
        )
    return CODED[layer.kind](layer, plan.weight_bytes)


def _refuse_other_shape(layer: Layer, planned: tuple[int, int], what: str) -> None:
    """Raises PlanError where a plan was made for a weight of another shape."""
    shape = tuple(layer.matrix.shape)
    if planned != shape:
        raise PlanError(
            f"the plan {what} layer {layer.name!r} as a matrix {list(planned)}, but its weight is a matrix "
            f"{list(shape)}: the plan was made for another model. Make one for this."
        )


def _width_of_grid(plan: LayerPlan) -> str:
    assert plan.grid is not None
    return f"{plan.grid.bits}" if plan.grid.rounding == "nearest" else f"{plan.grid.bits} {plan.grid.rounding}"


KINDS: dict[LayerPlanKind, Kind] = {
    "kept": Kind("kept in floating point", "#8C8C8C", None, None, None, False, lambda plan: "kept"),
    "grid": Kind("codes on a grid", "#0072B2", _packed, QuantisedMatrix, None, False, _width_of_grid),
    "low_rank": Kind("two factors", "#E69F00", _low_rank, FactoredMatrix, None, False, lambda plan: ""),
    "sum": Kind("codes plus two factors", "#009E73", _low_rank, FactoredMatrix, None, False, _width_of_grid),
    "coded": Kind(
        "codes at their entropy",
        "#CC79A7",
        _coded,
        EncodedMatrix,
        "fast",
        True,
        lambda plan: f"{plan.bits:.2f} coded",
    ),
}


def stored_as(plan: LayerPlan) -> str:
    """Describes one layer in words: its kind, and the width of its codes where all have the same.

    Example:
        >>> from hf_lossless.storage.plan import Grid
        >>> stored_as(LayerPlan(kind="grid", grid=Grid(bits=3), cost_bytes=9, predicted_loss_change=0.0))
        'codes on a grid, 3 bits'
    """
    words = KINDS[plan.kind].words
    if plan.kind in ("kept", "coded"):
        return words
    return f"{words}, {'floating point' if plan.bits == KEPT_BITS else f'{plan.bits} bits'}"


def extras_of(plan: CompressionPlan) -> list[str]:
    """Returns the names of this package's extras that make loading a checkpoint with this plan faster."""
    extras = {KINDS[layer.kind].extra for layer in plan.layers.values()}
    return sorted(extra for extra in extras if extra is not None)
