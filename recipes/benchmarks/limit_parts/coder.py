"""What the coder takes: against entropies, beside steps and models, and how fast it decodes."""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_lossless.storage.entropy.frequencies import Frequencies, entropy_bytes
from hf_lossless.storage.entropy.levels import best_levels, model_counts
from hf_lossless.storage.entropy.matrix import OVERHEAD_BYTES, decode
from hf_lossless.storage.entropy.steps import encode_steps
from hf_lossless.storage.values import EncodedMatrix

_BYTES_PER_FAR_CODE = 8
_TRIES = 5


def coder_figures(layers: Iterable[EncodedMatrix]) -> dict[str, Any]:
    """Bytes of the coded layers by what they are for, and weights a second of one thread.

    The zeroth-order entropy is that of each layer's codes with one model, and with no word on that model.
    """
    layers = list(layers)
    parts = {"stored": 0, "overhead": 0, "far": 0, "models": 0, "steps": 0, "levels": 0}
    entropy = zeroth = 0.0
    num_weights = 0
    for layer in layers:
        matrix = layer.matrix
        levels, _ = best_levels(matrix.codes)
        counts = model_counts(matrix.codes, levels)
        entropy += sum(map(_entropy_bits, counts)) / 8
        zeroth += _entropy_bits(counts.sum(0)) / 8
        num_weights += matrix.codes.size
        parts["stored"] += len(layer.stored)
        parts["overhead"] += OVERHEAD_BYTES
        parts["far"] += _BYTES_PER_FAR_CODE * len(matrix.far_codes)
        parts["models"] += sum(len(Frequencies.of(-128, one).to_bytes()) for one in counts)
        for kind, symbols in (
            ("steps", encode_steps(matrix.row_steps)[0]),
            ("steps", encode_steps(matrix.column_steps)[0]),
            ("levels", levels.rows),
            ("levels", levels.columns),
        ):
            occurrences = np.bincount(symbols)
            parts["models"] += len(Frequencies.of(0, occurrences).to_bytes())
            parts[kind] += entropy_bytes(occurrences)
    beside = sum(size for name, size in parts.items() if name != "stored")
    return {
        "layers": len(layers),
        "weights": num_weights,
        "bytes": parts,
        "bits_per_weight": 8 * parts["stored"] / num_weights,
        "entropy_bytes": entropy,
        "zeroth_order_entropy_bytes": zeroth,
        "codes_over_entropy": (parts["stored"] - beside) / entropy,
        "stored_over_entropy": parts["stored"] / entropy,
        "stored_over_zeroth_order_entropy": parts["stored"] / zeroth,
        "share_beside_codes": beside / parts["stored"],
        "decoded_weights_per_second": num_weights / _decoding_seconds(layers),
    }


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    present = counts[counts > 0]
    return float(-(present * np.log2(present / present.sum())).sum()) if len(present) else 0.0


def _decoding_seconds(layers: list[EncodedMatrix]) -> float:
    """Processor time, the least of some tries: others use the machine."""
    times = []
    for _ in range(_TRIES):
        start = time.process_time()
        for layer in layers:
            decode(layer.stored, layer.matrix.codes.shape)
        times.append(time.process_time() - start)
    return min(times)
