"""Carrying out a plan: every planned layer of a model is replaced by its compressed module.

The same code runs on real weights, which it quantises, and on meta tensors, where it only makes room for the tensors
of a saved checkpoint.
"""

from collections.abc import Mapping

from accelerate.hooks import add_hook_to_module
from torch import nn

from hf_lossless.candidates.uniform import quantise
from hf_lossless.errors import PlanError
from hf_lossless.layers import Layer, kind_of
from hf_lossless.modules import COMPRESSED, TIED, CompressedModule
from hf_lossless.plan import Grid, LayerPlan


def apply_plan(model: nn.Module, layer_plans: Mapping[str, LayerPlan]) -> nn.Module:
    """Replaces the planned layers, in place.

    Args:
        model: On any device. On meta, the new modules are left empty.
        layer_plans: Layer plans by module name of this very model.

    Returns:
        The model.

    Raises:
        PlanError: A layer is not in the model, or cannot be compressed; nothing has been replaced then.
    """
    layers = {name: resolve(model, name, layer_plan) for name, layer_plan in layer_plans.items()}
    grids = {name: layer_plan.grid for name, layer_plan in layer_plans.items() if layer_plan.grid is not None}
    replacements = [(layers[name], _compressed(layers[name], grid)) for name, grid in grids.items()]
    for layer, compressed in replacements:
        _replace(model, layer, compressed)
    return model


def _compressed(layer: Layer, grid: Grid) -> CompressedModule:
    compressed = COMPRESSED[layer.kind](layer, grid)
    if not layer.weight.is_meta:
        quantised = quantise(layer.matrix, grid)
        if quantised.grid != grid:
            raise PlanError(
                f"the plan stores the scales of layer {layer.name!r} as {grid.scale_dtype}, its weight needs "
                f"{quantised.grid.scale_dtype}: the plan was made for other weights. Make one for these."
            )
        compressed.store(quantised)
    return compressed


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
