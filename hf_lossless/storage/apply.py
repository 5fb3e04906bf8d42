"""Carrying out a plan: every planned layer of a model is replaced by its compressed module.

The same code runs on real weights, which it stores as planned, and on meta tensors, where it only makes room for the
tensors of a saved checkpoint.
"""

from collections.abc import Mapping

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn

from hf_lossless.candidates.low_rank import Factors
from hf_lossless.candidates.round_coded import CodedLayer
from hf_lossless.candidates.uniform import quantise
from hf_lossless.errors import PlanError
from hf_lossless.storage.activation_grid import StaticGrid, may_quantise_input
from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.layers import Layer, kind_of
from hf_lossless.storage.modules.activations import QuantisedInput
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.coded import CODED, CodedModule
from hf_lossless.storage.modules.low_rank import LOW_RANK, LowRankModule
from hf_lossless.storage.modules.packed import PACKED, PackedModule
from hf_lossless.storage.modules.tied import TIED
from hf_lossless.storage.plan import ActivationGrid, CodedGrid, Grid, LayerPlan, LowRank


def apply_plan(
    model: nn.Module,
    layer_plans: Mapping[str, LayerPlan],
    factors: Mapping[str, Factors] = {},
    quantised: Mapping[str, QuantisedMatrix] = {},
    coded: Mapping[str, CodedLayer] = {},
    static_grids: Mapping[str, StaticGrid] = {},
) -> nn.Module:
    """Replaces the planned layers, in place.

    Args:
        model: On any device. On meta, the new modules are left empty.
        layer_plans: Layer plans by module name of this very model.
        factors: The factors of the layers that are planned as "low_rank" or "sum", of the planned rank, by layer name.
            They are put on the planned grids here; where there is none, they take the dtype of the layer's weight. On
            meta they are not needed.
        quantised: Codes of the layers that are planned with the rounding "feedback", which needs the calibration data
            (see `candidates.round_packed`), by layer name. All others are rounded here. On meta they are not needed.
        coded: The same of the layers that are planned as "coded" (see `candidates.round_coded`).
        static_grids: Where the levels of static activations lie, by layer name. On meta they are not needed.

    Returns:
        The model.

    Raises:
        PlanError: A layer is not in the model, cannot be compressed, or not in the planned way, its factors or codes
            are missing or do not fit, or its static grid is missing; nothing has been replaced then.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8, bias=False))
        >>> left, right = torch.ones(8, 1), torch.ones(1, 8)
        >>> low_rank = LowRank(rank=1, shape=(8, 8))
        >>> plan = LayerPlan(kind="low_rank", low_rank=low_rank, cost_bytes=64, predicted_loss_change=0.0)
        >>> apply_plan(model, {"0": plan}, {"0": Factors(left, right)})(torch.ones(1, 8))
        tensor([[8., 8., 8., 8., 8., 8., 8., 8.]], grad_fn=<MmBackward0>)
    """
    layers = {name: resolve(model, name, layer_plan) for name, layer_plan in layer_plans.items()}
    replacements = [
        (layers[name], _compressed(layers[name], layer_plan, factors.get(name), quantised.get(name), coded.get(name)))
        for name, layer_plan in layer_plans.items()
        if layer_plan.kind != "kept"
    ]
    for layer, compressed in replacements:
        compressed.activation = _activation(layer, layer_plans[layer.name], static_grids.get(layer.name))
    for layer, compressed in replacements:
        _replace(model, layer, compressed)
    return model


def _compressed(
    layer: Layer,
    layer_plan: LayerPlan,
    factors: Factors | None,
    quantised: QuantisedMatrix | None,
    coded: CodedLayer | None,
) -> CompressedModule:
    if layer_plan.coded is not None:
        return _coded(layer, layer_plan, layer_plan.coded, coded)
    if layer_plan.low_rank is not None:
        return _factorised(layer, layer_plan, layer_plan.low_rank, factors)
    assert layer_plan.grid is not None
    packed = PACKED[layer.kind](layer, layer_plan.grid)
    if layer.weight.is_meta:
        return packed
    if layer_plan.grid.rounding == "feedback":
        packed.store(_checked_codes(quantised, layer, layer_plan.grid))
    else:
        _store(packed, layer.matrix, layer)
    return packed


def _factorised(layer: Layer, layer_plan: LayerPlan, low_rank: LowRank, factors: Factors | None) -> LowRankModule:
    _refuse_misfit(layer, layer_plan, low_rank)
    module = LOW_RANK[layer.kind](layer, low_rank, layer_plan.grid)
    if not layer.weight.is_meta:
        factors = _checked(factors, layer, low_rank)
        _store(module.left, factors.left, layer)
        _store(module.right, factors.right, layer)
        if module.base is not None:
            _store(module.base, layer.matrix, layer)
    return module


def _coded(layer: Layer, layer_plan: LayerPlan, grid: CodedGrid, coded: CodedLayer | None) -> CodedModule:
    shape = tuple(layer.matrix.shape)
    if grid.shape != shape:
        raise PlanError(
            f"the plan codes layer {layer.name!r} as a matrix {list(grid.shape)}, but its weight is a matrix "
            f"{list(shape)}: the plan was made for another model. Make one for this."
        )
    num_bytes = layer_plan.cost_bytes - (layer_plan.activation.stored_bytes if layer_plan.activation else 0)
    if num_bytes < 0:
        raise PlanError(
            f"the plan gives layer {layer.name!r} {layer_plan.cost_bytes} bytes, fewer than its input's range takes. "
            "Take config.json again from where the checkpoint came from."
        )
    module = CODED[layer.kind](layer, num_bytes)
    if not layer.weight.is_meta:
        if coded is None or coded.grid != grid or len(coded.stored) != num_bytes:
            what = "were not given" if coded is None else f"are on {coded.grid}, of {len(coded.stored)} bytes"
            raise PlanError(
                f"the plan codes layer {layer.name!r} on {grid}, in {num_bytes} bytes, but its codes {what}. "
                f"Give them: apply_plan(model, layer_plans, coded={{{layer.name!r}: ...}}), see settle_coded()."
            )
        module.store(coded.matrix, coded.stored)
    return module


def _activation(layer: Layer, layer_plan: LayerPlan, static: StaticGrid | None) -> QuantisedInput | None:
    if layer_plan.activation is None:
        return None
    if not may_quantise_input(layer.kind, layer.tied):
        raise PlanError(
            f"the plan quantises the input of layer {layer.name!r}, which looks up rows or shares its weight with "
            "other modules: such an input stays in floating point. Make a new plan for this model."
        )
    if layer_plan.activation.range == "static" and not layer.weight.is_meta and static is None:
        raise PlanError(
            f"the plan gives the input of layer {layer.name!r} a static range, which was not given. "
            f"Give it: apply_plan(model, layer_plans, static_grids={{{layer.name!r}: StaticGrid(scale, zero)}})."
        )
    return quantised_input(layer, layer_plan.activation, static)


def quantised_input(layer: Layer, grid: ActivationGrid, static: StaticGrid | None) -> QuantisedInput:
    """What puts a layer's input on a grid, with its levels where it has a static range and they are known."""
    module = QuantisedInput(layer.kind, grid, layer.weight.device)
    if grid.range == "static" and static is not None and not layer.weight.is_meta:
        module.store(static.scale, static.zero)
    return module


def _store(part: nn.Module, matrix: Tensor, layer: Layer) -> None:
    """Puts a matrix into a packed module, on its grid, or into a plain layer as it is."""
    if not isinstance(part, PackedModule):
        assert isinstance(part.weight, nn.Parameter)
        with torch.no_grad():
            part.weight.copy_(matrix.view(part.weight.shape))
        return
    quantised = quantise(matrix, part.grid)
    if quantised.grid != part.grid:
        raise PlanError(
            f"the plan stores the scales of layer {layer.name!r} as {part.grid.scale_dtype}, its weight needs "
            f"{quantised.grid.scale_dtype}: the plan was made for other weights. Make one for these."
        )
    part.store(quantised)


def _refuse_misfit(layer: Layer, layer_plan: LayerPlan, low_rank: LowRank) -> None:
    """Raises PlanError where a layer cannot be stored as the factors that are planned for it."""
    shape = tuple(layer.matrix.shape)
    if low_rank.shape != shape:
        raise PlanError(
            f"the plan factorises layer {layer.name!r} as a matrix {list(low_rank.shape)}, but its weight is a matrix "
            f"{list(shape)}: the plan was made for another model. Make one for this."
        )
    groups = getattr(layer.module, "groups", 1)
    if groups != 1:
        raise PlanError(
            f"the plan factorises layer {layer.name!r}, a convolution in {groups} groups: only one in one group has "
            "such factors. Plan a grid for it."
        )
    if layer_plan.kind == "low_rank" and low_rank.numbers_share >= 1:
        most = shape[0] * shape[1] / sum(shape)
        raise PlanError(
            f"the plan gives layer {layer.name!r} {list(shape)} the rank {low_rank.rank}, which saves nothing: its "
            f"factors hold as many numbers as its weight or more. Plan a rank below {most:.4g}, or a grid."
        )


def _checked_codes(quantised: QuantisedMatrix | None, layer: Layer, grid: Grid) -> QuantisedMatrix:
    """The codes, where there are any and they are of this layer and this grid."""
    if quantised is None:
        raise PlanError(
            f"the plan rounds layer {layer.name!r} by feedback, which needs the calibration data, but its codes were "
            f"not given. Give them: apply_plan(model, layer_plans, quantised={{{layer.name!r}: ...}}), see settle()."
        )
    if quantised.grid != grid or quantised.codes.shape != layer.matrix.shape:
        raise PlanError(
            f"the codes of layer {layer.name!r} are a matrix {list(quantised.codes.shape)} on {quantised.grid}, the "
            f"plan needs {list(layer.matrix.shape)} on {grid}. Settle them for this plan."
        )
    return quantised


def _checked(factors: Factors | None, layer: Layer, low_rank: LowRank) -> Factors:
    """The factors, where there are any and they are of the planned shapes."""
    if factors is None:
        raise PlanError(
            f"the plan factorises layer {layer.name!r}, but its factors were not given. "
            f"Give them: apply_plan(model, layer_plans, factors={{{layer.name!r}: Factors(left, right)}})."
        )
    out_features, in_features = low_rank.shape
    wanted = [out_features, low_rank.rank], [low_rank.rank, in_features]
    given = list(factors.left.shape), list(factors.right.shape)
    if given != wanted:
        raise PlanError(
            f"the factors of layer {layer.name!r} have the shapes {given[0]} and {given[1]}, the plan needs "
            f"{wanted[0]} and {wanted[1]}. Truncate them to the planned rank."
        )
    return factors


def resolve(model: nn.Module, name: str, layer_plan: LayerPlan) -> Layer:
    """The layer that a plan means.

    Raises:
        PlanError: There is no such module, or it is not a layer.
    """
    for part in (name, *layer_plan.tied):
        try:
            module = model.get_submodule(part)
        except AttributeError as error:
            raise PlanError(
                f"the plan names the layer {part!r}, which {type(model).__name__} does not have. "
                "Load the checkpoint with the class that saved it (config.json: architectures)."
            ) from error
        kind = kind_of(module)
        if kind is None or (part != name and kind not in TIED):
            raise PlanError(
                f"the plan compresses {part!r}, which is a {type(module).__name__} and cannot be compressed. "
                "Make a new plan for this model with hf_lossless.compress()."
            )
    home = model.get_submodule(name)
    kind = kind_of(home)
    assert kind is not None
    return Layer(name, home, kind, layer_plan.tied)


def _replace(model: nn.Module, layer: Layer, compressed: CompressedModule) -> None:
    for name in layer.tied:
        module = model.get_submodule(name)
        kind = kind_of(module)
        assert kind is not None
        _put(model, name, TIED[kind](compressed, getattr(module, "bias", None)))
    _put(model, layer.name, compressed)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Sets a submodule, with the hook of Accelerate that brings inputs to its device where the old one had one."""
    hook = getattr(model.get_submodule(name), "_hf_hook", None)
    model.set_submodule(name, module if hook is None else add_hook_to_module(module, hook))
