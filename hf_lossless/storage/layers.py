"""Finds the layers that can be compressed, each seen as a matrix `W [out, in]`.

| module                  | weight                        | matrix                      |
|-------------------------|-------------------------------|-----------------------------|
| nn.Linear               | [out, in]                     | the same                    |
| transformers Conv1D     | [in, out]                     | transposed                  |
| nn.Conv2d               | [out, in / groups, kh, kw]    | [out, in / groups * kh * kw]|
| nn.Embedding            | [vocabulary, dim]             | the same                    |

A module is a layer only where it is used as its class defines it: one whose `forward` is overridden, whose weight is
computed (parametrised), or that changes its own weight (`max_norm`) is not compressed. Modules that share one weight
(tied embeddings) are one layer: the first is its home, the others are listed as tied.
"""

import fnmatch
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lossless.errors import ConfigurationError

LayerKind = Literal["linear", "conv1d", "conv2d", "embedding"]

_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: "linear",
    Conv1D: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Embedding: "embedding",
}


@dataclass(frozen=True)
class Layer:
    """A compressible module with its place in the model.

    Attributes:
        name: Dotted module name.
        module: The home of the weight: the first module that has it.
        kind: Its row in the table above.
        tied: Names of other modules that use the same weight.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    tied: tuple[str, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """Returns the weight as the module holds it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def matrix(self) -> Tensor:
        """Returns the weight as `W [out, in]`: a view, or a copy where a kernel has another memory layout."""
        return as_matrix(self.weight, self.kind)

    @property
    def packed_rows(self) -> int:
        """Returns the number of rows in which codes are packed: one per embedding, for separate look-up; else one."""
        return self.matrix.shape[0] if self.kind == "embedding" else 1


def as_matrix(weight: Tensor, kind: LayerKind) -> Tensor:
    """Reshapes a weight, or its gradient, to `[out, in]`."""
    if kind == "conv1d":
        return weight.T
    return weight.flatten(1) if kind == "conv2d" else weight


def kind_of(module: nn.Module) -> LayerKind | None:
    """Returns the kind of a module, or None where it cannot be compressed."""
    base = next((base for base in _KINDS if isinstance(module, base)), None)
    if base is None or type(module).forward is not base.forward:
        return None
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # replaced on the instance, not by Accelerate
        return None
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return None
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None
    if "bias" in module._buffers:  # a compressed module registers its bias as a parameter
        return None
    weight = module._parameters.get("weight")
    return _KINDS[base] if weight is not None and weight.is_floating_point() and weight.numel() else None


def find_layers(model: nn.Module, exclude: Iterable[str] = ()) -> list[Layer]:
    """Finds all layers of a model, in the order of its modules.

    Args:
        model: Any module, on any device, meta included.
        exclude: Modules that are not compressed: a full name, a parent's name, the last part of a name, or a glob
            pattern.

    Returns:
        The layers; a shared weight is one layer, and is excluded with any of its names.

    Raises:
        ConfigurationError: An entry of `exclude` matches no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(layer.name, tuple(layer.matrix.shape)) for layer in find_layers(model, exclude=["2"])]
        [('0', (8, 4))]
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    excluded = set()
    for pattern in exclude:
        matched = {name for name in names if matches(name, pattern)}
        if not matched:
            raise ConfigurationError(
                f"modules_to_not_convert names {pattern!r}, but the model has no such module. "
                "Give a module's full name, its last part, a parent's name, or a glob pattern such as '*.pooler.*'."
            )
        excluded |= matched

    homes: dict[int, list[tuple[str, nn.Module, LayerKind]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is not None:
            homes.setdefault(id(module.weight), []).append((name, module, kind))
    names_of_weight = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    layers = []
    for identity, users in homes.items():
        name, module, kind = users[0]
        # A transposed or flattened view cannot replace a plain weight, and a module that is no layer needs its tensor,
        # so weights shared in such ways are not compressed.
        tieable = len(users) == 1 or all(user_kind in ("linear", "embedding") for _, _, user_kind in users)
        tieable = tieable and names_of_weight[identity] == len(users)
        if tieable and not any(user in excluded for user, _, _ in users):
            layers.append(Layer(name, module, kind, tuple(user for user, _, _ in users[1:])))
    return layers


def left_out_bytes(model: nn.Module, layers: Iterable[Layer]) -> dict[str, int]:
    """Computes the bytes of the matrices that are not compressed because they are no layers, by name, largest first.

    Args:
        model: The model.
        layers: The layers of the model.

    Returns:
        Parameters of two dimensions or more; vectors (biases, norms) are omitted, because they are small.
    """
    covered = {id(layer.weight) for layer in layers}
    found = {
        name: parameter.nbytes
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in covered
    }
    return dict(sorted(found.items(), key=lambda one: -one[1]))


def left_out_text(model: nn.Module, layers: Iterable[Layer]) -> str | None:
    """Describes the matrices that are no layers, with bytes and classes, in a sentence; None where there are none."""
    layers = list(layers)
    found = left_out_bytes(model, layers)
    if not found:
        return None
    by_place: dict[str, int] = {}
    for name, size in found.items():
        module, _, parameter = name.rpartition(".")
        place = f"{type(model.get_submodule(module)).__name__}.{parameter}"
        by_place[place] = by_place.get(place, 0) + size
    places = ", ".join(f"{place} ({size:,} bytes)" for place, size in sorted(by_place.items(), key=lambda one: -one[1]))
    share = sum(found.values()) / max(sum(parameter.nbytes for parameter in model.parameters()), 1)
    return f"{share:.0%} of the model's parameters are no layers that can be compressed and stay as they are: {places}"


def matches(name: str, pattern: str) -> bool:
    """Returns whether a pattern matches a module's name: its full name, its last part, a parent's name, or a glob."""
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.startswith(pattern + ".") or name.endswith("." + pattern) or f".{pattern}." in name


def modules_of(model: nn.Module, layer: Layer) -> list[nn.Module]:
    """Returns the modules that use a layer's weight; a module with several names appears once."""
    modules = [model.get_submodule(name) for name in (layer.name, *layer.tied)]
    return list({id(module): module for module in modules}.values())


def tensor_bytes(model: nn.Module) -> int:
    """Computes the bytes of all tensors that a checkpoint of the model holds; shared ones count once."""
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    storages = {
        # Offloaded tensors have no storage at the moment.
        name if tensor.is_meta else (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape): (
            tensor.nbytes
        )
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.numel() and name not in unsaved
    }
    return sum(storages.values())
