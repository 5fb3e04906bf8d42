"""Fixed and entropy-coded storage at equal budgets, as `compress` plans them, beside the rate-distortion bound."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from peer_methods.problem import logits_of
from peers import scores

from hf_lossless import LosslessCompressionConfig
from hf_lossless.calibration.curvature import second_order_change
from hf_lossless.candidates.damping import shaped_damping
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.checkpoints.guards import state_dict_with_guards
from hf_lossless.checkpoints.names import with_present_bytes
from hf_lossless.compression import analyse, realise
from hf_lossless.errors import UnreachableTargetError
from hf_lossless.planning.planner import Planned, Planner
from hf_lossless.planning.target import Target
from hf_lossless.storage.layers import LayerKind
from hf_lossless.storage.plan import Damping
from hf_lossless.theories.rate_distortion import rate_distortion
from limit_parts.trial import Bench

Points = list[tuple[float, float]]
"""Bytes and loss."""

STORAGES = ("fixed", "entropy")

Keep = Callable[[float, Planned, Path], None]
"""What else is to be done with a plan: its ratio, the plan, the folder of the saved model."""


@dataclass(frozen=True)
class Original:
    """A checkpoint as it came.

    Attributes:
        folder: Where it is.
        file_bytes: Of its safetensors file.
    """

    folder: Path

    @property
    def file_bytes(self) -> int:
        """Bytes of its safetensors files."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


def frontier(
    bench: Bench, original: Original, storage: str, ratios: Sequence[float], keep: Keep = lambda *_: None
) -> dict[str, Any]:
    """What `compress` makes of the model with one kind of storage, at each ratio, from one analysis."""
    problem = bench.problem
    planner = analyse(problem.model, problem.batches, _config(storage, ratios[0]))
    rows: dict[str, Any] = {}
    for ratio in ratios:
        try:
            planned = planner.plan(Target(ratio=ratio))
        except UnreachableTargetError as error:
            rows[f"{ratio:g}"] = {"unreachable": str(error)}
            continue
        rows[f"{ratio:g}"] = row = _row(bench, original, planner, planned, ratio, keep)
        print(storage, ratio, row, flush=True)
    return {"rows": rows, "bounds": bounds_of(bench, planner)}


def bounds_of(bench: Bench, planner: Planner) -> dict[str, Points]:
    """The rate-distortion bound in the metric as it is, and in the damped one."""
    problem, other_bytes = planner.problem, bench.other_bytes
    return {
        "undamped": rate_distortion(problem, other_bytes),
        "damped": rate_distortion(problem, other_bytes, damping=_damping(planner)),
    }


def _config(storage: str, ratio: float) -> LosslessCompressionConfig:
    return LosslessCompressionConfig(ratio=ratio, storage=(storage,))


def _row(
    bench: Bench, original: Original, planner: Planner, planned: Planned, ratio: float, keep: Keep
) -> dict[str, Any]:
    model = bench.problem.copy()
    measured = realise(model, planner.problem, planned)
    checkpoint = LosslessCheckpointConfig.of(with_present_bytes(model, planned.plan))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.config.quantization_config = checkpoint
        model.save_pretrained(folder, state_dict=state_dict_with_guards(model))
        file_bytes = sum(file.stat().st_size for file in (*folder.glob("*.safetensors"), folder / "config.json"))
        keep(ratio, planned, folder)
    return {
        "size_bytes": checkpoint.size_bytes,
        "ratio": bench.problem.original_bytes / checkpoint.size_bytes,
        "file_bytes": file_bytes,
        "file_ratio": original.file_bytes / file_bytes,
        "tensor_bytes": checkpoint.plan.tensor_bytes,
        **bench.judged(scores(logits_of(model), bench.test_batches)),
        "predicted": planned.plan.predicted_loss_change,
        **_own_costs(planner, planned),
        "measured": measured.mean,
        "kinds": _counted([one.kind for one in planned.plan.layers.values()]),
    }


def _own_costs(planner: Planner, planned: Planned) -> dict[str, float]:
    """What its own rows say that a plan costs, in the metric as it is and in the one that shapes grids."""
    costs = {"in_sample": 0.0, "damped": 0.0}
    damping_of_kind = _damping(planner)
    for layer in planner.problem.layers:
        curvature = planner.problem.calibration.layers[layer.name].curvature
        if planned.plan.layers[layer.name].kind == "kept" or curvature is None:
            continue
        error, damping = planned.error(layer), damping_of_kind(layer.kind)
        rows, columns = curvature.damped(damping.rows).rows, curvature.damped(damping.columns).columns
        costs["in_sample"] += second_order_change(error, curvature)
        costs["damped"] += second_order_change(error, replace(curvature, rows=rows, columns=columns))
    return costs


def _damping(planner: Planner) -> Callable[[LayerKind], Damping]:
    """The damping of coded grids of a kind of layer; the default where there are none."""
    candidates = planner.problem.candidates
    chosen = {
        layer.kind: candidate.coded.damping
        for layer in planner.problem.layers
        for candidate in candidates[layer.name]
        if candidate.coded is not None
    }
    return lambda kind: chosen.get(kind, shaped_damping(kind, 1.0))


def _counted(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def bits_above_bound(row: dict[str, Any], bounds: dict[str, Points], num_weights: int) -> dict[str, float]:
    """Bits per weight that a plan takes beyond the bound at equal loss.

    The loss is what other rows predict, what those say that it was fitted to, and what these say in the damped metric,
    with the bound of that metric.
    """
    return {
        quantity: 8 * (row["tensor_bytes"] - bytes_at(row[quantity], bounds[metric])) / num_weights
        for quantity, metric in (("predicted", "undamped"), ("in_sample", "undamped"), ("damped", "damped"))
        if row[quantity] > 0
    }


def bytes_at(loss: float, points: Points) -> float:
    """Bytes of the bound at a loss, between its points along the logarithm of the loss."""
    found = sorted((math.log(one), num_bytes) for num_bytes, one in points)
    return float(np.interp(math.log(loss), *zip(*found, strict=True)))


def gain_at_equal_divergence(fixed: dict[str, Any], entropy: dict[str, Any]) -> dict[str, float]:
    """File ratio of entropy-coded over fixed storage where both have the same held-out divergence.

    At the divergence of each fixed plan; the entropy-coded ratio lies between two plans, along log KL on log ratio.
    None beyond the plans that there are.
    """
    known = sorted((math.log(row["kl"]), math.log(row["file_ratio"])) for row in _reached(entropy))
    gains = {}
    for ratio, row in fixed.items():
        if "kl" in row and known and known[0][0] <= math.log(row["kl"]) <= known[-1][0]:
            at = np.interp(math.log(row["kl"]), *zip(*known, strict=True))
            gains[ratio] = float(math.exp(at) / row["file_ratio"])
    return gains


def largest_within_one_error(rows: dict[str, Any]) -> dict[str, Any] | None:
    """The plan of the largest file ratio whose held-out loss rose by no more than one standard error."""
    good = [row for row in _reached(rows) if row["loss_change"] <= row["loss_change_se"]]
    return max(good, key=lambda row: row["file_ratio"], default=None)


def _reached(rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in rows.values() if "kl" in row]
