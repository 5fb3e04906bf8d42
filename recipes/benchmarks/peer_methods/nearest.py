"""The plain baseline: one width for every layer, rounded to nearest on our own uniform grids, in groups of 64."""

from functools import partial

from hf_lossless.candidates.grids import grid_of
from hf_lossless.candidates.stored import stored_layer
from hf_lossless.candidates.uniform import quantise
from hf_lossless.storage.apply import apply
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.plan import LayerPlan
from peer_methods.problem import PeerModel, PeerProblem, logits_of
from peer_methods.stored_bytes import stored_bytes

_GROUP_SIZE = 64


def _nearest(problem: PeerProblem, bits: int) -> PeerModel:
    model = problem.copy()
    apply(model, {layer.name: stored_layer(layer, _plan(layer, bits)) for layer in find_layers(model)})
    return PeerModel(
        logits_of(model), stored_bytes(model), f"every layer, embeddings and head too, in groups of {_GROUP_SIZE}"
    )


def _plan(layer: Layer, bits: int) -> LayerPlan:
    grid = quantise(layer.matrix, grid_of(bits, layer.matrix.shape[1], _GROUP_SIZE, symmetric=True)).grid
    return LayerPlan(kind="grid", grid=grid, cost_bytes=0, predicted_loss_change=0.0, tied=layer.tied)


METHODS = {f"round to nearest, {bits} bits": partial(_nearest, bits=bits) for bits in (8, 4, 3, 2)}
