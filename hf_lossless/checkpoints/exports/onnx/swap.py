"""Puts ONNX forms in place of what compressed layers compute, for as long as a model is traced.

A layer is asked for three things (see `storage.modules.base`): products with its matrix, rows of it, or the matrix
itself. One forward pass shows which of them a model asks of which layer; factors, tied heads and convolutions follow.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_lossless.checkpoints.exports.convert import NotConvertible
from hf_lossless.checkpoints.exports.onnx.blocks import BlockLinear
from hf_lossless.checkpoints.exports.onnx.folded import FoldedMatrix
from hf_lossless.checkpoints.exports.onnx.int8 import Int8Linear, SharedInputs
from hf_lossless.checkpoints.exports.onnx.levels import Leaf, Levels, leaves, levels_of
from hf_lossless.checkpoints.exports.onnx.lookup import Lookup
from hf_lossless.checkpoints.exports.onnx.standard import StandardLinear, StandardWeight

Runtime = Literal["fast", "small", "standard"]
Use = Literal["linear", "embedding", "matrix"]
_FLOAT_INPUTS, _INT8_INPUTS = 0, 4
_USES: tuple[Use, ...] = ("linear", "embedding", "matrix")


def _fast(levels: Levels, module: Leaf, shared: SharedInputs) -> nn.Module:
    """Whole numbers, but where the checkpoint has its own 8-bit inputs: rounded twice, they would be others."""
    return Int8Linear(levels, shared) if module.activation is None else _small(levels, module, shared)


def _small(levels: Levels, module: Leaf, shared: SharedInputs) -> nn.Module:
    """Blocks, or standard operators where these have no place for the layer."""
    try:
        return BlockLinear(levels, _FLOAT_INPUTS if module.activation is not None else _INT8_INPUTS)
    except NotConvertible:
        return StandardLinear(levels)


def _standard(levels: Levels, module: Leaf, shared: SharedInputs) -> nn.Module:
    return StandardLinear(levels)


_LINEAR: dict[Runtime, Callable[[Levels, Leaf, SharedInputs], nn.Module]] = {
    "fast": _fast,
    "small": _small,
    "standard": _standard,
}
_MATRIX: dict[Runtime, type[nn.Module]] = {
    "fast": FoldedMatrix,
    "small": StandardWeight,
    "standard": StandardWeight,
}
RUNTIMES: tuple[Runtime, ...] = tuple(_LINEAR)


@contextmanager
def onnx_forms(model: nn.Module, runtime: Runtime, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Makes every compressed layer compute in its ONNX form inside the block.

    Args:
        model: A loaded model in float32.
        runtime: What the graph is for.
        inputs: Arguments of one forward pass, which shows what is asked of each layer.
    """
    uses, shared, modules = _uses(model, inputs), SharedInputs(), leaves(model)
    changed = [modules[name] for name in uses]
    try:
        for name, asked in uses.items():
            _take_form(modules[name], runtime, asked, shared)
        yield
    finally:
        for module in changed:
            for use in _USES:
                module.__dict__.pop(use, None)
                module._modules.pop(_form_name(use), None)


def _form_name(use: Use) -> str:
    return f"{use}_form"


def _take_form(module: Leaf, runtime: Runtime, asked: set[Use], shared: SharedInputs) -> None:
    levels = levels_of(module)
    for use in asked:
        form: nn.Module
        if use == "linear":
            form = _LINEAR[runtime](levels, module, shared)
        else:
            form = Lookup(levels) if use == "embedding" else _MATRIX[runtime](levels)
        module.add_module(_form_name(use), form)
        module.__dict__[use] = form


def _uses(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, set[Use]]:
    """What a forward pass asks of each leaf; what a leaf asks of itself on the way is not counted."""
    found: defaultdict[str, set[Use]] = defaultdict(set)
    inside: list[str] = []

    def noted(name: str, use: Use, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(method)
        def call(*args: Any) -> Tensor:
            if name not in inside:
                found[name].add(use)
            inside.append(name)
            try:
                return method(*args)
            finally:
                inside.pop()

        return call

    modules = leaves(model)
    try:
        for name, module in modules.items():
            for use in _USES:
                module.__dict__[use] = noted(name, use, getattr(module, use))
        with torch.no_grad():
            model(**inputs)
    finally:
        for module in modules.values():
            for use in _USES:
                module.__dict__.pop(use, None)
    return dict(found)
