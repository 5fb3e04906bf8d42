"""optimum-quanto: 8, 4 and 2 bits, by its default ranges and by HQQ, and int8 with calibrated int8 activations."""

from functools import partial

import torch

from peer_methods.problem import PeerModel, PeerProblem, logits_of, package
from peer_methods.stored_bytes import stored_bytes


def _quanto(problem: PeerProblem, bits: int, *, hqq: bool = False, activations: bool = False) -> PeerModel:
    with package("optimum.quanto"):
        from optimum.quanto import Calibration, HqqOptimizer, freeze, qint2, qint4, qint8, quantize
    model = problem.copy()
    widths = {2: qint2, 4: qint4, 8: qint8}
    quantize(
        model,
        weights=widths[bits],
        activations=qint8 if activations else None,
        optimizer=HqqOptimizer() if hqq else None,
    )
    if activations:
        with torch.no_grad(), Calibration():
            for inputs in problem.inputs:
                model(**inputs)
    freeze(model)
    kind = "weights and activations" if activations else "weights only"
    note = f"{kind}; linear layers and convolutions; embeddings stay in float32: quanto has no quantised embedding"
    return PeerModel(logits_of(model), stored_bytes(model), note)


METHODS = {
    "quanto int8": partial(_quanto, bits=8),
    "quanto int8, activations too": partial(_quanto, bits=8, activations=True),
    "quanto 4 bits": partial(_quanto, bits=4),
    "quanto 4 bits, HQQ": partial(_quanto, bits=4, hqq=True),
    "quanto 2 bits": partial(_quanto, bits=2),
    "quanto 2 bits, HQQ": partial(_quanto, bits=2, hqq=True),
}
