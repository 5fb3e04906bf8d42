"""A finished graph against the model that it was made of, both run on the same inputs at two shapes.

    ||theirs - ours||  <=  limit ||ours||        for each output at each shape

The run time "standard" multiplies in floating point and differs by rounding alone: a thousandth is allowed. Inputs of 8
bits move outputs by some hundredths, of random tokens more than of text; a wrong weight, axis or shift moves them by
about 1.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lossless.checkpoints.exports.onnx.swap import Runtime

LIMITS: dict[Runtime, float] = {"fast": 0.3, "small": 0.3, "standard": 1e-3}


def largest_difference(path: Path, cases: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> float:
    """Runs a graph on one thread.

    Args:
        path: The file.
        cases: Inputs, and the outputs that the model gives, by their names.

    Returns:
        The largest `||theirs - ours|| / ||ours||`; infinity where an output is not finite or has another shape.
    """
    run = session(path)
    differences = [0.0]
    for inputs, expected in cases:
        found = run.run(list(expected), {name: tensor.numpy() for name, tensor in inputs.items()})
        for theirs, ours in zip(found, expected.values(), strict=True):
            if theirs.shape != tuple(ours.shape) or not np.isfinite(theirs).all():
                return float("inf")
            difference = torch.from_numpy(theirs).double() - ours.double()
            differences.append(float(difference.norm() / ours.double().norm().clamp(min=1e-12)))
    return max(differences)


def session(path: Path) -> Any:
    """Opens the file in onnxruntime, on one thread of the CPU; inputs take 8 bits only where the file asks for it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
