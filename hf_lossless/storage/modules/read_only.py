"""The weight of a compressed layer as other code reads it: a rebuilt tensor that refuses to be written to.

Writing to a rebuilt copy would not change what the model computes. So every write raises: in place, by `.data`, by
`requires_grad=True`, by `out=`, and through a view. Results of other operations are plain tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lossless.errors import ConfigurationError

_WRITES_BY_NAME = {"__setitem__"} | {
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
}
_NO_WRITES = {"share_memory_", "detach_"}


class ReadOnlyWeight(Tensor):
    """A rebuilt weight; writing to it raises, because it would not change the layer."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation on the plain tensors, and refuses operations that write."""
        kwargs = kwargs or {}
        if _writes(function, args, kwargs):
            raise ConfigurationError(
                f"{_name(function)} would write to the weight of a compressed layer, which is made anew each time that "
                "it is read, so that nothing would change. Write to a copy (weight.clone()), merge adapters and prune "
                "before compressing, or get a dense model back with model.dequantize()."
            )
        if _is_about_gradients(function):  # the weight has no gradients to turn off
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            owners = {_memory(one) for one in args if isinstance(one, cls)}
            if function is Tensor.numpy:
                result.setflags(write=False)
            return _protected(result, owners)


def read_only(weight: Tensor) -> Tensor:
    """Returns the weight as a tensor that refuses to be written to, or unchanged in a graph that is being compiled."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(ReadOnlyWeight)


def _name(function: Any) -> str:
    name = getattr(function, "__name__", str(function))
    return f"{function.__self__.__name__} =" if name == "__set__" else name


def _writes(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Returns whether an operation writes to a weight: to its first argument, or to that of `out=`."""
    if _is_weight(kwargs.get("out")):
        return True
    target = args[0] if args else next(iter(kwargs.values()), None)
    if not _is_weight(target):
        return False
    name = getattr(function, "__name__", "")
    if name == "__set__":
        attribute = function.__self__.__name__
        return attribute in ("data", "grad") or (attribute == "requires_grad" and bool(args[1]))
    if name == "requires_grad_":
        return bool(kwargs.get("requires_grad", args[1] if len(args) > 1 else True))
    return name in _WRITES_BY_NAME or (name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES)


def _is_about_gradients(function: Any) -> bool:
    sets = getattr(function, "__name__", "") == "__set__" and function.__self__.__name__ == "requires_grad"
    return sets or function is Tensor.requires_grad_


def _is_weight(value: Any) -> bool:
    if isinstance(value, tuple | list):  # torch._foreach_add_ and the like
        return any(isinstance(one, ReadOnlyWeight) for one in value)
    return isinstance(value, ReadOnlyWeight)


def _memory(tensor: Tensor) -> tuple[Any, int] | None:
    return None if tensor.is_meta or not tensor.numel() else (tensor.device, tensor.untyped_storage().data_ptr())


def _protected(result: Any, owners: set[Any]) -> Any:
    """Makes a result read-only where it is a view of the weight."""
    if isinstance(result, Tensor):
        if isinstance(result, ReadOnlyWeight):
            return result
        return result.as_subclass(ReadOnlyWeight) if (_memory(result) or ()) in owners else result
    if type(result) in (tuple, list):
        return type(result)(_protected(one, owners) for one in result)
    return result
