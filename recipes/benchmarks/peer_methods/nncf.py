"""NNCF's compress_weights on torch: int8, and int4 in groups with AWQ and scale estimation on the calibration rows."""

from functools import partial
from typing import Any

from peer_methods.problem import PeerModel, PeerProblem, logits_of, package
from peer_methods.stored_bytes import stored_bytes


def _nncf(problem: PeerProblem, mode: str, note: str, **settings: Any) -> PeerModel:
    with package("nncf"):
        import nncf
    model = nncf.compress_weights(
        problem.copy(), mode=nncf.CompressWeightsMode[mode], dataset=nncf.Dataset(problem.inputs), **settings
    )
    return PeerModel(logits_of(model), stored_bytes(model), note)


def _int4(group_size: int, more: str = "", **settings: Any) -> partial[PeerModel]:
    note = f"every layer, embeddings and head too, groups of {group_size}; convolutions int8, its only width for them"
    return partial(_nncf, mode="INT4_ASYM", note=note + more, group_size=group_size, all_layers=True, **settings)


_SCALES = "; scale estimation"

METHODS = {
    "nncf int8": partial(_nncf, mode="INT8_ASYM", note="every layer, embeddings and convolutions too, per channel"),
    "nncf int4 and int8": _int4(64, "; 80 % of the weights, the rest int8", ratio=0.8, scale_estimation=True),
    "nncf int4, groups of 32": _int4(32, _SCALES, scale_estimation=True),
    "nncf int4, groups of 64": _int4(64, _SCALES, scale_estimation=True),
    "nncf int4, groups of 128": _int4(128, _SCALES, scale_estimation=True),
    "nncf int4, groups of 64, AWQ": _int4(64, "; AWQ and scale estimation", awq=True, scale_estimation=True),
    "nncf int4, groups of 64, no data": _int4(64),
}
