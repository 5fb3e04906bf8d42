"""What can be compressed: layers, each seen as a matrix `W [out, in]`.

| module                  | weight                        | matrix                      |
|-------------------------|-------------------------------|-----------------------------|
| nn.Linear               | [out, in]                     | the same                    |
| transformers Conv1D     | [in, out]                     | transposed                  |
| nn.Conv2d               | [out, in / groups, kh, kw]    | [out, in / groups * kh * kw]|
| nn.Embedding            | [vocabulary, dim]             | the same                    |

A module counts only when it is used as its class defines it: one whose `forward` is overridden, whose weight is
computed (parametrised), or that changes its own weight (`max_norm`) is left alone. Modules that share one weight
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
        module: The module that is the weight's home.
        kind: Which row of the table above it is.
        tied: Names of other modules that use the same weight.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    tied: tuple[str, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module holds it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def matrix(self) -> Tensor:
        """The weight as `W [out, in]`: a view of its memory, or a copy where a kernel lies in another order."""
        return as_matrix(self.weight, self.kind)

    @property
    def packed_rows(self) -> int:
        """Rows in which codes are packed: one for each embedding, so that rows can be looked up alone; else one."""
        return self.matrix.shape[0] if self.kind == "embedding" else 1


def as_matrix(weight: Tensor, kind: LayerKind) -> Tensor:
    """A weight, or its gradient, as `[out, in]`."""
    if kind == "conv1d":
        return weight.T
    return weight.flatten(1) if kind == "conv2d" else weight


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a module, or None where it cannot be compressed."""
    base = next((base for base in _KINDS if isinstance(module, base)), None)
    if base is None or type(module).forward is not base.forward:
        return None
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return None
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None
    if "bias" in module._buffers:  # a compressed module takes its bias over as a parameter
        return None
    weight = module._parameters.get("weight")
    return _KINDS[base] if weight is not None and weight.is_floating_point() and weight.numel() else None


def find_layers(model: nn.Module, exclude: Iterable[str] = ()) -> list[Layer]:
    """All layers of a model, in the order of its modules.

    Args:
        model: Any module, on any device, meta included.
        exclude: Module names to leave alone: a full name, a parent's name, the last part of a name, or a glob pattern.

    Returns:
        The layers; a weight that is shared appears once. A shared weight is excluded with any of its names.

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
        # A transposed or flattened view cannot stand in for a plain one, and a module that is no layer cannot do
        # without its tensor: such sharing is left alone.
        tieable = len(users) == 1 or all(user_kind in ("linear", "embedding") for _, _, user_kind in users)
        tieable = tieable and names_of_weight[identity] == len(users)
        if tieable and not any(user in excluded for user, _, _ in users):
            layers.append(Layer(name, module, kind, tuple(user for user, _, _ in users[1:])))
    return layers


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name is meant: by its full name, its last part, a parent's name, or a glob pattern."""
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.startswith(pattern + ".") or name.endswith("." + pattern) or f".{pattern}." in name


def modules_of(model: nn.Module, layer: Layer) -> list[nn.Module]:
    """The modules that use a layer's weight; a module that has several names, once."""
    modules = [model.get_submodule(name) for name in (layer.name, *layer.tied)]
    return list({id(module): module for module in modules}.values())


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of the model holds; shared ones once."""
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    storages = {
        # What is offloaded has no memory now.
        name if tensor.is_meta else (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape): (
            tensor.nbytes
        )
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.numel() and name not in unsaved
    }
    return sum(storages.values())
