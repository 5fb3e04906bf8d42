"""Applies a plan: every planned layer of a model is replaced by its compressed module.

The same code runs on real weights, where it stores the planned values, and on meta tensors, where it only creates empty
modules for the tensors of a saved checkpoint. It does no rounding.
"""

from collections.abc import Mapping
from typing import Any

from accelerate.hooks import add_hook_to_module
from torch import nn

from hf_lossless.errors import PlanError
from hf_lossless.storage.activation_grid import StaticGrid, may_quantise_input
from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.kinds import KINDS
from hf_lossless.storage.layers import Layer, kind_of
from hf_lossless.storage.modules.activations import QuantisedInput
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.tied import TIED
from hf_lossless.storage.plan import ActivationGrid, Grid, LayerPlan
from hf_lossless.storage.values import EncodedMatrix, FactoredMatrix, StoredLayer

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
"""Names of the attributes in which torch keeps the hooks of a module."""


def apply_plan(model: nn.Module, layer_plans: Mapping[str, LayerPlan]) -> nn.Module:
    """Replaces the layers of a model on meta by empty compressed modules for the tensors of a saved plan; see `apply`.

    Args:
        model: The model, on meta, because no values are given.
        layer_plans: Layer plans by module name of this model.

    Returns:
        The model, with empty planned layers: `load_state_dict(tensors, assign=True)` fills them.

    Raises:
        PlanError: As for `apply`.
    """
    return apply(model, {name: StoredLayer(layer_plan) for name, layer_plan in layer_plans.items()})


def apply(model: nn.Module, stored: Mapping[str, StoredLayer]) -> nn.Module:
    """Replaces the layers of a model by compressed modules, in place.

    Args:
        model: The model, on any device. On meta, the new modules are left empty.
        stored: How each layer is stored, by module name of this model. On meta, values are not needed.

    Returns:
        The model.

    Raises:
        PlanError: A layer is not in the model, cannot be compressed (in the planned way), or its values are missing or
            do not fit. No layer has been replaced then.

    Example:
        >>> import torch
        >>> from hf_lossless.storage.plan import LowRank
        >>> model = nn.Sequential(nn.Linear(8, 8, bias=False))
        >>> low_rank = LowRank(rank=1, shape=(8, 8))
        >>> plan = LayerPlan(kind="low_rank", low_rank=low_rank, cost_bytes=64, predicted_loss_change=0.0)
        >>> values = FactoredMatrix(torch.ones(8, 1), torch.ones(1, 8))
        >>> apply(model, {"0": StoredLayer(plan, values)})(torch.ones(1, 8))
        tensor([[8., 8., 8., 8., 8., 8., 8., 8.]], grad_fn=<MmBackward0>)
    """
    layers = {name: resolve(model, name, one.plan) for name, one in stored.items()}
    replacements = [
        (layers[name], module) for name, one in stored.items() if (module := _compressed(layers[name], one)) is not None
    ]
    for layer, module in replacements:
        _replace(model, layer, module)
    return model


def _compressed(layer: Layer, stored: StoredLayer) -> CompressedModule | None:
    """Makes a layer's compressed module, filled unless it is on meta; None where the layer is kept."""
    kind = KINDS[stored.plan.kind]
    if kind.module is None:
        return None
    module = kind.module(layer, stored.plan)
    if not layer.weight.is_meta:
        _refuse_other_values(layer, stored)
        module.store(stored.values)
    module.activation = _activation(layer, stored.plan, stored.static)
    return module


def _refuse_other_values(layer: Layer, stored: StoredLayer) -> None:
    """Raises PlanError where the values are missing, or differ in type, shape or grid from the plan."""
    plan, values = stored.plan, stored.values
    wanted = KINDS[plan.kind].values
    assert wanted is not None
    if not isinstance(values, wanted):
        what = "were not given" if values is None else f"are a {type(values).__name__}"
        raise PlanError(
            f"the plan stores layer {layer.name!r} as {KINDS[plan.kind].words}, but its values {what}. Give them: "
            f"apply(model, {{{layer.name!r}: StoredLayer(plan, {wanted.__name__}(...))}}), or load saved tensors into "
            "a model on meta."
        )
    shape = tuple(layer.matrix.shape)
    for what, part, part_shape, grid in _parts(plan, values, shape):
        found_grid = part.grid if isinstance(part, QuantisedMatrix) else None
        found_shape = tuple((part.codes if isinstance(part, QuantisedMatrix) else part).shape)
        if found_grid != grid or found_shape != part_shape:
            raise PlanError(
                f"the {what} of layer {layer.name!r} are a matrix {list(found_shape)} on {found_grid or 'no grid'}, "
                f"the plan needs {list(part_shape)} on {grid or 'no grid'}. Round them for this plan."
            )
    if isinstance(values, EncodedMatrix) and len(values.stored) != plan.weight_bytes:
        raise PlanError(
            f"the plan codes layer {layer.name!r} in {plan.weight_bytes} bytes, but its codes take "
            f"{len(values.stored)}. Round them for this plan."
        )


def _parts(
    plan: LayerPlan, values: QuantisedMatrix | FactoredMatrix | EncodedMatrix, shape: tuple[int, ...]
) -> list[tuple[str, Any, tuple[int, ...], Grid | None]]:
    """Lists the parts of a layer's values, with the shape and the grid that the plan gives to each."""
    if isinstance(values, QuantisedMatrix):
        return [("codes", values, shape, plan.grid)]
    if isinstance(values, EncodedMatrix):
        return [("codes", values.matrix.codes, shape, None)]
    assert plan.low_rank is not None
    out_features, in_features = shape
    rank = plan.low_rank.rank
    base = [("codes beside the factors", values.base, shape, plan.grid)] if plan.grid is not None else []
    return [
        ("left factors", values.left, (out_features, rank), plan.low_rank.left),
        ("right factors", values.right, (rank, in_features), plan.low_rank.right),
        *base,
    ]


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
            f"Give it: apply(model, {{{layer.name!r}: StoredLayer(plan, values, StaticGrid(scale, zero))}})."
        )
    return quantised_input(layer, layer_plan.activation, static)


def quantised_input(layer: Layer, grid: ActivationGrid, static: StaticGrid | None) -> QuantisedInput:
    """Makes the module that quantises a layer's input, with scale and zero point where they are static and given."""
    module = QuantisedInput(layer.kind, grid, layer.weight.device)
    if grid.range == "static" and static is not None and not layer.weight.is_meta:
        module.store(static.scale, static.zero)
    return module


def resolve(model: nn.Module, name: str, layer_plan: LayerPlan) -> Layer:
    """Finds the layer that a plan names.

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
    """Sets a submodule, with the hooks of the old one, including Accelerate's, which moves inputs to its device."""
    old = model.get_submodule(name)
    carry_hooks(old, module)
    hook = getattr(old, "_hf_hook", None)
    model.set_submodule(name, module if hook is None else add_hook_to_module(module, hook))
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its fast path reads weights and calls no layer; it is not taken where the activation is neither ReLU nor GELU.
        parent.activation_relu_or_gelu = 0


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives a module the hooks of the module it replaces: the same dicts, so that a handle still removes its hook."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
