"""torch's dynamic quantisation: int8 linear layers that quantise their inputs as they come, and embeddings."""

import warnings
from functools import partial

import torch
from torch import nn

from peer_methods.problem import PeerModel, PeerProblem, Unavailable, logits_of
from peer_methods.stored_bytes import stored_bytes


def _dynamic(problem: PeerProblem, embedding_bits: int) -> PeerModel:
    if embedding_bits != 8 and not any(isinstance(module, nn.Embedding) for module in problem.model.modules()):
        raise Unavailable("the model has no embeddings")
    quantization = torch.ao.quantization
    embeddings = {
        8: quantization.float_qparams_weight_only_qconfig,
        4: quantization.float_qparams_weight_only_qconfig_4bit,
    }
    settings = {nn.Linear: quantization.per_channel_dynamic_qconfig, nn.Embedding: embeddings[embedding_bits]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of torch.ao.quantization is deprecated
        model = quantization.quantize_dynamic(problem.copy(), settings)
    note = f"linear layers int8 per channel with dynamic int8 inputs, embeddings {embedding_bits} bits per row"
    return PeerModel(logits_of(model), stored_bytes(model), note + "; convolutions stay in float32")


METHODS = {
    "torch dynamic int8": partial(_dynamic, embedding_bits=8),
    "torch dynamic int8, embeddings 4 bits": partial(_dynamic, embedding_bits=4),
}
