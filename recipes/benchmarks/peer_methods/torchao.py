"""torchao: int8 weights, int8 weights and inputs, 4 bits in groups, and a mix of widths by layer (FqnToConfig)."""

from collections import OrderedDict
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from peer_methods.problem import PeerModel, PeerProblem, Unavailable, logits_of, package
from peer_methods.stored_bytes import stored_bytes

_GROUP_SIZE = 64
_ROWS_OF_INT4_KERNEL = 16


def _torchao(problem: PeerProblem, linear: Literal["int8", "int8 dynamic", "int4", "mixed"]) -> PeerModel:
    with package("torchao"):
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import (
            FqnToConfig,
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            quantize_,
        )
        from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm
    model = problem.copy()
    int8 = Int8WeightOnlyConfig(set_inductor_config=False)
    int4 = PrototypeInt4WeightOnlyConfig(
        group_size=_GROUP_SIZE,
        int4_choose_qparams_algorithm=Int4ChooseQParamsAlgorithm.HQQ,
        set_inductor_config=False,
    )
    dynamic = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)

    def choose(name: str, module: nn.Linear) -> Any:
        if linear == "int8 dynamic":
            return dynamic
        narrow = linear == "int4" or (linear == "mixed" and "attention" not in name)
        return int4 if narrow and _int4_takes(module) else int8

    chosen: OrderedDict[str, Any] = OrderedDict()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            chosen[name] = choose(name, module)
        elif isinstance(module, nn.Embedding):
            chosen[name] = int8
        elif isinstance(module, nn.Conv2d):
            chosen[name] = IntxWeightOnlyConfig()  # int8; Int8WeightOnlyConfig's tensors have no convolution
    if linear in ("int4", "mixed") and int4 not in chosen.values():
        raise Unavailable(
            f"its 4-bit format on CPU (Int4OpaqueTensor) takes linear layers with inputs divisible by {_GROUP_SIZE} "
            f"and outputs divisible by {_ROWS_OF_INT4_KERNEL}, and the model has none; sub-byte convolutions "
            "(IntxWeightOnlyConfig) are stored one code in a byte"
        )
    for name, config in chosen.items():
        if config is int4:
            _in_bfloat16(model.get_submodule(name))
    quantize_(model, FqnToConfig(chosen), filter_fn=None)
    return PeerModel(logits_of(model), stored_bytes(model), _NOTES[linear])


def _int4_takes(module: nn.Linear) -> bool:
    return module.in_features % _GROUP_SIZE == 0 and module.out_features % _ROWS_OF_INT4_KERNEL == 0


def _in_bfloat16(module: nn.Module) -> None:
    """Lets one layer compute in bfloat16: the 4-bit kernel on CPU is made for it, and 60 times slower in float32."""
    module.to(torch.bfloat16)
    module.register_forward_pre_hook(lambda _, arguments: (arguments[0].bfloat16(),))
    module.register_forward_hook(lambda _, arguments, output: output.float())


_REST = "embeddings and convolutions int8: on x86 torchao stores their narrower codes one in a byte"
_NOTES = {
    "int8": "weights only, per row; embeddings and convolutions too",
    "int8 dynamic": "linear layers with dynamic int8 inputs; embeddings and convolutions int8, weights only",
    "int4": f"linear layers 4 bits (HQQ, groups of {_GROUP_SIZE}, in bfloat16); {_REST}",
    "mixed": f"by FqnToConfig: attention int8, other linear layers 4 bits (HQQ, groups of {_GROUP_SIZE}, in bfloat16); "
    f"{_REST}",
}

METHODS = {
    "torchao int8": partial(_torchao, linear="int8"),
    "torchao int8 dynamic": partial(_torchao, linear="int8 dynamic"),
    "torchao mixed 4 and 8 bits": partial(_torchao, linear="mixed"),
    "torchao 4 bits": partial(_torchao, linear="int4"),
}
