"""NVIDIA modelopt's auto_quantize, the nearest peer: gradient scores for each layer and width, and a linear program.

It searches linear layers and convolutions; embeddings cannot be searched, and get one width beforehand. What it
returns only behaves like a quantised model; a copy is packed by its `compress`, so that the bytes are real ones. The
copy gives the same scores, but its convolutions do not run. Its own "effective bits" count no scales.
"""

import copy
from functools import partial
from typing import Any

from torch import nn

from peer_methods.problem import PeerModel, PeerProblem, Unavailable, logits_of, package
from peer_methods.stored_bytes import stored_bytes

_BLOCK = 128  # that of INT4_BLOCKWISE_WEIGHT_ONLY_CFG
_WEIGHTS = {
    4: {"num_bits": 4, "block_sizes": {-1: _BLOCK, "type": "static"}},
    8: {"num_bits": 8, "axis": 0},
}


def _auto_quantize(problem: PeerProblem, effective_bits: float, embedding_bits: int) -> PeerModel:
    with package("modelopt"):
        import modelopt.torch.quantization as mtq
    model = problem.copy()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    int4, int8 = mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, mtq.INT8_WEIGHT_ONLY_CFG
    spaces = [
        {"module_name_patterns": names, "quantization_formats": formats, "allow_no_quant": False}
        for names, formats in ((linear, [int4, int8]), (convolutions, [int8]))
        if names
    ]
    model, found = mtq.auto_quantize(
        model,
        constraints={"effective_bits": effective_bits},
        module_search_spaces=spaces,
        fixed_quantization_config=_embeddings(embedding_bits),
        data_loader=problem.batches,
        forward_step=lambda quantised, batch: quantised(**batch),
        loss_func=lambda output, batch: output.loss,
        num_calib_steps=len(problem.batches),
        num_score_steps=len(problem.batches),
    )
    if not found["best"]["is_satisfied"]:
        raise Unavailable(
            f"no choice of int4 and int8 meets {effective_bits} effective bits; convolutions are int8 only"
        )
    model.eval()
    packed = copy.deepcopy(model)
    mtq.compress(packed)
    note = (
        f"linear layers int4 (blocks of {_BLOCK}) or int8 per channel as it chose at {effective_bits} effective bits; "
        f"convolutions int8 (its only width for them); embeddings {embedding_bits} bits, which it cannot search"
    )
    # _amax: what the scale beside it was made of
    return PeerModel(logits_of(model), stored_bytes(packed, leave_out=("_amax",)), note)


def _embeddings(bits: int) -> dict[str, Any]:
    """Weights of embeddings, and nothing else."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "parent_class": "nn.Embedding", "cfg": _WEIGHTS[bits]},
        ],
        "algorithm": "max",
    }


METHODS = {
    f"modelopt auto_quantize, {effective_bits} bits, embeddings {embedding_bits} bits": partial(
        _auto_quantize, effective_bits=effective_bits, embedding_bits=embedding_bits
    )
    for effective_bits, embedding_bits in ((4.1, 4), (4.5, 4), (5.0, 4), (6.0, 4), (6.0, 8), (8.0, 8))
}
