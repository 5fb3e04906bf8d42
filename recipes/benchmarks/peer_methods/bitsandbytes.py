"""bitsandbytes: LLM.int8 and nf4 linear layers, and its quantised embeddings."""

from functools import partial
from typing import Literal

import torch
from torch import nn

from peer_methods.problem import PeerModel, PeerProblem, Unavailable, logits_of, package
from peer_methods.stored_bytes import stored_bytes

_ROWS_OF_NF4_KERNEL = 32


def _bitsandbytes(problem: PeerProblem, width: Literal["int8", "nf4"], *, embeddings: bool) -> PeerModel:
    with package("bitsandbytes"):
        import bitsandbytes.nn as bnb
    model = problem.copy()
    replaced = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features, module.bias is not None)
            if width == "int8":
                twin = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
            elif module.out_features % _ROWS_OF_NF4_KERNEL == 0:
                twin = bnb.Linear4bit(*shape, quant_type="nf4", compute_dtype=torch.float32)
            else:
                continue
        elif embeddings and isinstance(module, nn.Embedding):
            kind = bnb.Embedding8bit if width == "int8" else bnb.EmbeddingNF4
            twin = kind(module.num_embeddings, module.embedding_dim)
        else:
            continue
        twin.load_state_dict(module.state_dict())
        model.set_submodule(name, twin)
        replaced += 1
    if not replaced:
        raise Unavailable(f"it has no convolutions, and no linear layer has outputs divisible by {_ROWS_OF_NF4_KERNEL}")
    if embeddings and not any(isinstance(module, nn.Embedding) for module in model.modules()):
        raise Unavailable("the model has no embeddings")
    model.to("cpu")  # quantises
    model.eval()
    note = f"linear layers{_BUT[width]}; embeddings {'too' if embeddings else 'and convolutions stay in float32'}"
    return PeerModel(logits_of(model), stored_bytes(model), note)


_BUT = {
    "int8": "",
    "nf4": f" whose outputs are divisible by {_ROWS_OF_NF4_KERNEL}, as its kernel on CPU needs: not the head",
}

METHODS = {
    f"bitsandbytes {width}{', embeddings too' if embeddings else ''}": partial(
        _bitsandbytes, width=width, embeddings=embeddings
    )
    for width in ("int8", "nf4")
    for embeddings in (False, True)
}
