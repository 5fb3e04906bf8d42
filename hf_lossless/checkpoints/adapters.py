"""LoRA of peft on compressed layers: `y = layer(x) + B A x`, with A and B trained and the layer unchanged.

Peft chooses an adapter by the class of a layer; compressed layers are added to its choices, whether peft is imported
before or after `hf_lossless`. Peft saves and loads such an adapter as any other. It cannot be merged, because the sum
of weight and adapter has no codes. A head that peft trains in full (`modules_to_save`, as it does for classifiers) is
trained as a plain layer, initialised with the compressed layer's values.
"""

from typing import Any

import torch
import wrapt
from peft.tuners.lora.layer import Conv2d, Embedding, Linear, LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.dense import dense_layer, make_dense
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.tied import Tied, TiedEmbedding


class _OnCompressed(LoraLayer):
    """Overrides of peft's methods for compressed layers."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        if getattr(module, "kind", None) == "conv2d":
            return int(module.in_channels), int(module.out_channels)
        home: CompressedModule = module.home if isinstance(module, Tied) else module
        out_features, in_features = home.matrix_shape
        looked_up = isinstance(module, TiedEmbedding) or getattr(module, "kind", None) == "embedding"
        return (out_features, in_features) if looked_up else (in_features, out_features)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses to merge, because the sum of weight and adapter has no codes."""
        raise ConfigurationError(
            "an adapter cannot be merged into a compressed layer: the sum has no codes. Keep it beside the layer "
            "(save_pretrained of the peft model saves it), or merge it into the original model and compress that."
        )


class LoraLinear(_OnCompressed, Linear):
    """LoRA of a compressed linear layer, including transformers' Conv1D."""


class LoraEmbedding(_OnCompressed, Embedding):
    """LoRA of a compressed embedding."""

    def _embed(self, input: Tensor, weight: Tensor, *hooks: Any, **more_hooks: Any) -> Tensor:
        layer: Any = self.get_base_layer()
        return F.embedding(input, weight, padding_idx=layer.padding_idx)


class LoraConv2d(_OnCompressed, Conv2d):
    """LoRA of a compressed convolution."""

    _plain: nn.Conv2d | None = None

    def get_base_layer(self) -> nn.Module:
        """Returns the compressed layer, or, while A and B are made, a plain convolution of its shape."""
        return super().get_base_layer() if self._plain is None else self._plain

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Makes A and B from a plain convolution of the same shape."""
        layer = self.get_base_layer()
        assert isinstance(layer, CompressedModule)
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        with torch.device("meta"):
            plain = nn.Conv2d(**{name: getattr(layer, name) for name in names}, bias=layer.bias is not None)
        # Peft reads only shape, dtype and device of the weight, so it is on meta and takes no memory.
        first = next(iter(layer.weight_tensors.values()))
        number = torch.zeros((), dtype=layer.dtype, device=first.device)
        plain.weight = nn.Parameter(number.expand(layer.weight_shape), requires_grad=False)
        object.__setattr__(self, "_plain", plain)
        try:
            super().update_layer(*args, **kwargs)
        finally:
            object.__setattr__(self, "_plain", None)


def _adapter_class(layer: nn.Module) -> Any:
    """Chooses the adapter class of a compressed or tied layer; None for other modules."""
    if isinstance(layer, Tied):
        return LoraEmbedding if isinstance(layer, TiedEmbedding) else LoraLinear
    if not isinstance(layer, CompressedModule):
        return None
    return {"linear": LoraLinear, "conv1d": LoraLinear, "conv2d": LoraConv2d, "embedding": LoraEmbedding}[layer.kind]


def _create(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Wraps peft's own choice of an adapter."""

    def chosen(lora_config: Any, adapter_name: str, target: nn.Module, **settings: Any) -> Any:
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        adapter = _adapter_class(layer)
        if adapter is None or isinstance(layer, tuple(lora_config._custom_modules or ())):  # the user's own choice
            return wrapped(lora_config, adapter_name, target, **settings)
        if settings.get("parameter_name") is not None:
            raise ConfigurationError(
                "target_parameters names the weight of a compressed layer, which has codes instead. Name the layer in "
                "target_modules."
            )
        return adapter(target, adapter_name, config=lora_config, **settings)

    return chosen(*args, **kwargs)


def _copy_to_train(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Replaces compressed layers by plain ones in a copy that peft trains in full, because codes are not trained."""
    known = set(instance.modules_to_save)
    result = wrapped(*args, **kwargs)
    for name in set(instance.modules_to_save) - known:
        trained = instance.modules_to_save[name]
        plain = dense_layer(trained) if isinstance(trained, CompressedModule) else make_dense(trained)
        plain.requires_grad_(name in instance.active_adapters)
        instance.modules_to_save[name] = plain
    return result


def register() -> None:
    """Adds compressed layers to the layers that peft can adapt."""
    wrapt.wrap_function_wrapper(LoraModel, "_create_new_module", _create)
    wrapt.wrap_function_wrapper(ModulesToSaveWrapper, "update", _copy_to_train)


register()
