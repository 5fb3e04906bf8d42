"""`CompressedModule`: the interface of all compressed layers to the model around them, however they are stored.

A compressed module replaces the original, with the same attributes and its bias under the same name. Modules are
replaced rather than tensor types, which is easier to read, to debug and to save.

Names matter to transformers: no tensor of a compressed module has a name that begins with "weight" (its tying code
matches prefixes), and everything but trainable weights is a buffer, because a float parameter would come back trainable
and could be mistaken for the model's dtype.

The state dict of a compressed layer holds a guard too: an empty tensor under the name "weight". It is saved wherever
the tensors are (save_pretrained, a part saved alone, a Trainer's checkpoint, torch.save), and stops programs without
this package from filling the layer with random weights: no weight has the shape [0].
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.layers import Layer, LayerKind
from hf_lossless.storage.modules.activations import QuantisedInput
from hf_lossless.storage.modules.read_only import read_only
from hf_lossless.storage.modules.running import Running

_ATTRIBUTES: dict[LayerKind, tuple[str, ...]] = {
    "linear": ("in_features", "out_features"),
    "conv1d": ("nx", "nf"),
    "conv2d": (
        *("in_channels", "out_channels", "kernel_size", "stride"),
        *("padding", "padding_mode", "dilation", "groups"),
    ),
    "embedding": ("num_embeddings", "embedding_dim", "padding_idx"),
}
"""The attributes of a layer, beside weight and bias, that model code reads."""


class CompressedModule(Running, ABC):
    """Base of the compressed layers.

    Attributes:
        kind: Kind of the original layer.
        weight_shape: Shape of the original weight.
        matrix_shape: (out, in) of the weight as a matrix.
        dtype: Dtype in which the module computes; follows `.to(dtype)` as a weight would.
        bias: The original's bias; None where it had none.
        activation: Quantises the layer's input; None: it stays in floating point.
        guarded: Whether its state dict holds a guard; False for parts of another compressed layer.
    """

    kind: LayerKind
    bias: nn.Parameter | None
    activation: QuantisedInput | None
    guarded: bool = True

    def __init__(self, layer: Layer) -> None:
        """Takes over the attributes and the bias of `layer`; subclasses make the stored tensors."""
        super().__init__()
        self.kind = layer.kind
        self.weight_shape = layer.weight.shape
        out_features, in_features = layer.matrix.shape
        self.matrix_shape = (out_features, in_features)
        self.dtype = layer.weight.dtype
        self.training = layer.module.training
        for name in _ATTRIBUTES[layer.kind]:
            setattr(self, name, getattr(layer.module, name))
        self.register_parameter("bias", getattr(layer.module, "bias", None))
        self.activation = None

    def quantised(self, input: Tensor) -> Tensor:
        """Quantises the layer's input, or returns it unchanged where `activation` is None."""
        return input if self.activation is None else self.activation(input)

    @abstractmethod
    def store(self, values: Any) -> None:
        """Stores the values of the layer (see `storage.values`)."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Rebuilds the weight `W [out, in]` in the module's dtype, at each call."""

    @abstractmethod
    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Computes y = x W' + b, whatever the layer's kind.

        Args:
            input: x [..., in].
            bias: b [out], or None.

        Returns:
            y [..., out].
        """

    def linear_now(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Computes y = x W' + b in the layer's run-time form, where it has one that supports the input."""
        output = self.in_form(input, bias) if self.form is not None else None
        return self.linear(input, bias) if output is None else output

    @abstractmethod
    def embedding(self, indices: Tensor) -> Tensor:
        """Looks up rows of W, whatever the layer's kind.

        Args:
            indices: Row numbers, of any shape [...].

        Returns:
            [..., in].

        Raises:
            IndexError: A number is negative or not below `out`.
        """

    @property
    def weight(self) -> Tensor:
        """Rebuilds the weight in its original shape, at each access; writing to it raises an error."""
        matrix = self.matrix()
        weight = read_only(matrix.T if self.kind == "conv1d" else matrix.view(self.weight_shape))
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers must not initialise it anew
        return weight

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses a new weight, with which the layer would not compute."""
        if name == "weight":
            raise ConfigurationError(
                "a compressed layer takes no other weight: it computes with its codes. Replace the whole layer, or get "
                "a dense model back with model.dequantize()."
            )
        super().__setattr__(name, value)

    @property
    def weight_tensors(self) -> dict[str, Tensor]:
        """Returns all tensors that store the weight (all but the bias), by their names in the module's state dict."""
        tensors = self.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in tensors.items() if name not in ("bias", "weight")}

    @property
    def weight_bytes(self) -> int:
        """Returns the bytes of the weight as it is stored now."""
        return sum(tensor.nbytes for tensor in self.weight_tensors.values())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Adds the guard to the tensors, unless the module is on meta."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.guarded and not any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers())):
            # A view of one element: safetensors takes all empty storages for the same one, and would write one guard
            # only.
            destination[f"{prefix}weight"] = torch.empty(1, device="cpu")[:0]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Drops the guard, and refuses a dense weight, which would otherwise be ignored with strict=False."""
        weight = state_dict.pop(f"{prefix}weight", None) if self.guarded else None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if weight is not None and weight.numel():
            error_messages = lists[-1]
            error_messages.append(
                f"'{prefix}weight' has shape {list(weight.shape)}, but that layer is compressed and takes no dense "
                "weight. Load the original checkpoint into the original model."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as any module does, and tracks the dtype."""
        device = next(itertools.chain(self.buffers(), self.parameters())).device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return super()._apply(fn, recurse)


def compressed_layers(model: nn.Module) -> dict[str, CompressedModule]:
    """Finds the compressed layers of a model, by name; modules inside of a compressed layer are not listed."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, CompressedModule)}
    parts = {part for module in found.values() for part in module.children()}
    return {name: module for name, module in found.items() if module not in parts}


class WholeLinear(CompressedModule):
    """nn.Linear, or transformers' Conv1D, whose weight is [in, out]."""

    def forward(self, input: Tensor) -> Tensor:
        """Computes y = x W' + b."""
        return self.linear_now(self.quantised(input), self.bias)


class WholeConv2d(CompressedModule):
    """nn.Conv2d, grouped and depthwise too."""

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int

    def forward(self, input: Tensor) -> Tensor:
        """Computes the convolution with the rebuilt kernel."""
        input = self.quantised(input)
        if self.form is not None:
            output = self.in_form(input, None if self.bias is None else self.bias.view(-1, 1, 1))
            if output is not None:
                return output
        kernel = self.matrix().view(self.weight_shape)
        return F.conv2d(input, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


class WholeEmbedding(CompressedModule):
    """nn.Embedding; rebuilds only the rows that it looks up."""

    def forward(self, input: Tensor) -> Tensor:
        """Looks up the rows of the weight at `input`."""
        return self.embedding(input)
