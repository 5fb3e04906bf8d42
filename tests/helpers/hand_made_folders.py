"""Saved folders whose config.json says what a test wants it to; their tensors have the right number of bytes."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_lossless.certification.certificate import Certificate, Provenance
from hf_lossless.certification.certify import certify
from hf_lossless.certification.comparison import Outputs
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.checkpoints.record import CompressionRecord, write_record
from hf_lossless.planning.loss_check import LossCheck
from hf_lossless.storage.plan import ActivationGrid, CompressionPlan, Grid, LayerPlan, LowRank, activations_of

FACTORS = LowRank(rank=3, shape=(12, 20), left=Grid(bits=8), right=Grid(bits=4, group_size=8))
LAYERS = {
    "kept": LayerPlan(kind="kept", cost_bytes=4000, predicted_loss_change=0.0),
    "grid": LayerPlan(
        kind="grid",
        grid=Grid(bits=3, group_size=64),
        activation=ActivationGrid(bits=8, range="static"),
        cost_bytes=100,
        predicted_loss_change=0.125,
    ),
    "factors": LayerPlan(
        kind="low_rank",
        low_rank=FACTORS,
        activation=ActivationGrid(bits=4, range="dynamic"),
        cost_bytes=70,
        predicted_loss_change=-0.0625,
    ),
    "both": LayerPlan(kind="sum", grid=Grid(bits=2), low_rank=FACTORS, cost_bytes=90, predicted_loss_change=0.25),
}
"""A layer of each kind, two of them with quantised inputs."""


def plan_of(layers: dict[str, LayerPlan] = LAYERS, **settings: Any) -> CompressionPlan:
    settings = {"theory": "curvature", "other_bytes": 40, "original_bytes": 20_000, **settings}
    return CompressionPlan(layers=layers, activations=activations_of(layers), **settings)


def many_layers(count: int) -> dict[str, LayerPlan]:
    """Layers of a deep model, of all kinds in turn, under names of the usual length."""
    kinds = list(LAYERS.values())
    parts = ("attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense")
    return {
        f"model.encoder.layer.{index // len(parts)}.{parts[index % len(parts)]}": kinds[index * 7 // 3 % len(kinds)]
        for index in range(count)
    }


def record_for(plan: CompressionPlan, **settings: Any) -> CompressionRecord:
    """A record of a compression that ended with this plan."""
    chosen = (plan.tensor_bytes, plan.predicted_loss_change)
    frontier = ((chosen[0] // 2, 2.0 + abs(chosen[1])), chosen, (plan.original_bytes, min(0.0, chosen[1]) - 1e-6))
    check = LossCheck(
        checked="model",
        tensor_bytes=chosen[0],
        predicted_loss_change=chosen[1],
        measured_loss_change=0.03125,
        standard_error=0.015625,
    )
    settings = {
        "theory": plan.theory,
        "original_bytes": plan.original_bytes,
        "size_bytes": LosslessCheckpointConfig.of(plan).size_bytes,
        "chosen": chosen,
        "measured_loss_change": check.measured_loss_change,
        "measured_loss_change_error": check.standard_error,
        "frontier": frontier,
        "frontier_plans": 7,
        "resolution_bytes": 0,
        "checks": (check,),
        "layer_order": tuple(plan.layers),
        "calibration_rows": 128,
        "calibration_loss": 0.5,
        **settings,
    }
    return CompressionRecord(**settings)


def certificate_of(
    change: float = 0.0, rows: int = 2000, *, metric_name: str = "accuracy", **asked: Any
) -> Certificate:
    """A certificate of a model whose loss on every row is higher by `change`, and whose first answer has changed."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(rows, generator=generator, dtype=torch.float64)
    right = torch.ones(rows)
    answers = torch.zeros(rows, dtype=torch.long)
    original = Outputs(losses, right, answers, None)
    changed = answers.clone()
    changed[0] = 1
    worse = right.clone()
    worse[0] = 0
    provenance = Provenance(
        data_fingerprint="ab12cd", calibration_rows=128, selection_rows=300, theory="curvature", seed=0
    )
    return certify(
        original, Outputs(losses + change, worse, changed, None), provenance, metric_name=metric_name, **asked
    )


def save_folder(
    folder: Path,
    plan: CompressionPlan,
    *,
    certificate: Certificate | None = None,
    record: CompressionRecord | None = None,
    **about: Any,
) -> Path:
    """Writes config.json, one tensor of as many bytes as the plan speaks of, and perhaps compression.json."""
    folder.mkdir(parents=True)
    entry = LosslessCheckpointConfig.of(plan, certificate).to_dict()
    config = {"architectures": ["TinyModel"], "model_type": "tiny", **about, "quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file({"all": torch.zeros(plan.tensor_bytes, dtype=torch.uint8)}, folder / "model.safetensors")
    if record is not None:
        write_record(folder, record)
    return folder
