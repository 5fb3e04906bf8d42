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


def _int4(group_size: int, **settings: Any) -> partial[PeerModel]:
    words = {"scale_estimation": "scale estimation", "awq": "AWQ", "ratio": "of int4, the rest int8"}
    said = ", ".join(f"{value if key == 'ratio' else ''} {words[key]}".strip() for key, value in settings.items())
    note = f"every layer, embeddings and head too, groups of {group_size}; convolutions int8, its only width for them"
    return partial(
        _nncf,
        mode="INT4_ASYM",
        note=f"{note}; {said}" if said else note,
        group_size=group_size,
        all_layers=True,
        **settings,
    )


METHODS = {
    "nncf int8": partial(_nncf, mode="INT8_ASYM", note="every layer, embeddings and convolutions too, per channel"),
    "nncf int8 and int4, half each": _int4(64, ratio=0.5, scale_estimation=True),
    "nncf int4, groups of 32": _int4(32, scale_estimation=True),
    "nncf int4, groups of 64": _int4(64, scale_estimation=True),
    "nncf int4, groups of 128": _int4(128, scale_estimation=True),
    "nncf int4, groups of 64, AWQ": _int4(64, awq=True, scale_estimation=True),
    "nncf int4, groups of 64, no data": _int4(64),
}
