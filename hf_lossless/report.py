"""What a person sees: tables, JSON, and the picture of the frontier."""

import os
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from hf_lossless.config import LosslessCheckpointConfig
from hf_lossless.evaluation import Evaluation
from hf_lossless.knapsack import Frontier
from hf_lossless.pipeline import CompressionResult
from hf_lossless.plan import CompressionPlan, LayerPlan


def inspection(config: LosslessCheckpointConfig) -> dict[str, Any]:
    """A compressed checkpoint as JSON values: its layers, its size, its ratio.

    Returns:
        "layers": for each layer kind, bits (16 stands for kept), group_size (None: the whole row), rank (None: not
        factorised), cost_bytes, predicted_loss_change; and "size_bytes", "original_bytes", "ratio", "theory",
        "activations", "predicted_loss_change".
    """
    plan = config.plan
    return {
        "layers": {name: _layer(layer) for name, layer in plan.layers.items()},
        "size_bytes": config.size_bytes,
        "original_bytes": plan.original_bytes,
        "ratio": plan.original_bytes / config.size_bytes,
        "theory": plan.theory,
        "activations": plan.activations,
        "activation_noise": plan.activation_noise,
        "predicted_loss_change": plan.predicted_loss_change,
    }


def _layer(layer: LayerPlan) -> dict[str, Any]:
    return {
        "kind": layer.kind,
        "bits": layer.bits,
        "group_size": layer.grid.group_size if layer.grid is not None else None,
        "rank": None,
        "cost_bytes": layer.cost_bytes,
        "predicted_loss_change": layer.predicted_loss_change,
    }


def plan_table(plan: CompressionPlan) -> Table:
    """The plan, one line a layer; "predicted" is the predicted change of the loss."""
    table = Table(title=f"plan ({plan.theory}; activations: {plan.activations})")
    table.add_column("layer", overflow="fold")
    for heading in ("bits", "group", "bytes", "predicted"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    for name, layer in plan.layers.items():
        bits, group = "kept", ""
        if layer.grid is not None:
            direction = "" if layer.grid.rounding == "nearest" else f" {layer.grid.rounding}"
            bits, group = f"{layer.grid.bits}{direction}", str(layer.grid.group_size or "row")
        table.add_row(name, bits, group, f"{layer.cost_bytes:,}", f"{layer.predicted_loss_change:+.1e}")
    table.add_row("everything else", "kept", "", f"{plan.other_bytes:,}", "")
    return table


def comparison_table(rows: dict[str, tuple[Evaluation, int]], original_bytes: int) -> Table:
    """Models side by side.

    Args:
        rows: Evaluation and bytes of each model by its name.
        original_bytes: What ratios are taken of.
    """
    table = Table()
    metric_name = next(iter(rows.values()))[0].metric_name
    for heading in ("model", "bytes", "ratio", "loss", metric_name, "rows"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, (evaluation, size_bytes) in rows.items():
        table.add_row(
            name,
            f"{size_bytes:,}",
            f"{original_bytes / size_bytes:.2f}",
            f"{evaluation.loss:.4f}",
            f"{evaluation.metric:.4f}",
            f"{evaluation.num_examples:,}",
        )
    return table


def plot_frontier(result: CompressionResult, path: str | os.PathLike[str]) -> None:
    """Draws every plan of the frontier, and the one that was chosen, as a PNG file.

    The horizontal axis is the bytes of all tensors, the vertical one the predicted change of the loss.
    """
    frontier: Frontier = result.frontier
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tensor_bytes = frontier.cost_bytes + result.plan.other_bytes
    axes.step(tensor_bytes, frontier.predicted_loss_change, where="post", label=f"frontier, {len(frontier):,} plans")
    axes.plot(
        result.plan.tensor_bytes,
        result.plan.predicted_loss_change,
        "o",
        label=f"chosen, {result.ratio:.2f} times smaller",
    )
    axes.set_xlabel(f"bytes of all tensors (original: {result.plan.original_bytes:,})")
    axes.set_ylabel(f"predicted change of the loss, {result.plan.theory}")
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
